// The token weights of NLFT, from recorded scores and the options of a job: what edge_agent/training/methods/nlft.py computes,
// again for every position of a slider. No part of the page is known here.

export const OTHER = 0,
  JOINED = 1,
  SALIENT = 2;
const FADED = 24; // steps after which a released walk has forgotten a token: 2^-24 of its centre, the last bit of 32-bit products
const HALVES = Float64Array.from({ length: 2 * FADED + 2 }, (_, power) => 2 ** -power);

// Puts the records of a saliency document one after another into typed arrays. Step 0 is the scoring before training; each later
// step replaces what was scored again in its epoch.
export function prepare(saliency) {
  const records = saliency.records,
    starts = new Int32Array(records.length + 1);
  records.forEach((record, r) => {
    starts[r + 1] = starts[r] + record.tokens.length;
  });
  const tokens = starts[records.length];
  const epochs = [...new Set(records.flatMap((record) => record.rescored.map((scores) => scores.epoch)))].sort((a, b) => a - b);
  const steps = [scoresOf(records, starts, tokens, (record) => record)];
  for (const epoch of epochs) {
    steps.push(scoresOf(records, starts, tokens, (record) => record.rescored.findLast((scores) => scores.epoch <= epoch) ?? record));
  }
  const longest = records.reduce((most, record) => Math.max(most, record.tokens.length), 0);
  return {
    records,
    starts,
    tokens,
    epochs,
    steps,
    longest,
    incorrect: Uint8Array.from(records, (record) => record.kind === "incorrect"),
    products: records.map((record) => productsOf(record)),
    reach: { key: "", low: new Int32Array(tokens), high: new Int32Array(tokens), unknown: new Uint8Array(tokens) },
  };
}

function scoresOf(records, starts, tokens, choose) {
  const step = { base: new Float64Array(tokens), standard: new Float64Array(tokens), judge: new Float64Array(tokens) };
  records.forEach((record, r) => {
    const scores = choose(record);
    for (const name of ["base", "standard", "judge"]) {
      if (scores[name]) step[name].set(scores[name], starts[r]);
      else step[name].fill(NaN, starts[r], starts[r + 1]);
    }
  });
  return step;
}

// Inner products of hidden states: row t holds those of state t with states t, t - 1, ... t - span; little-endian 32 bits in base64.
function productsOf(record) {
  if (!record.products) return null;
  const text = atob(record.products),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const view = new DataView(bytes.buffer),
    values = new Float32Array(bytes.length / 4);
  for (let i = 0; i < values.length; i++) values[i] = view.getFloat32(4 * i, true);
  return { values, width: values.length / record.tokens.length, sums: null };
}

export function results(table) {
  const tokens = table.tokens,
    records = table.records.length;
  return {
    likelihood: new Float64Array(tokens),
    unlikelihood: new Float64Array(tokens),
    loss: new Float64Array(tokens),
    role: new Uint8Array(tokens),
    recordLoss: new Float64Array(records),
    salient: new Int32Array(records),
    unknown: new Uint8Array(records),
  };
}

// Fills `out` with weights, roles and losses of all records under one set of options.
// `out.unknown` marks records whose clusters depend on hidden states that were not recorded.
export function weigh(table, step, options, out) {
  const scores = table.steps[step];
  const clusters = options.cluster !== "none";
  if (clusters) forgetOthers(table, options);
  for (let r = 0; r < table.records.length; r++) {
    const from = table.starts[r],
      to = table.starts[r + 1];
    out.unknown[r] = 0;
    if (table.incorrect[r]) incorrect(table, scores, options, out, r, from, to, clusters);
    else correct(table, scores, options, out, r, from, to, clusters);
    let loss = 0;
    for (let t = from; t < to; t++) {
      const up = out.likelihood[t],
        down = out.unlikelihood[t];
      let part = 0;
      if (up > 0) part -= up * scores.base[t];
      if (down > 0) part -= down * logComplement(scores.base[t]);
      out.loss[t] = part;
      loss += part;
    }
    out.recordLoss[r] = loss / (to - from);
  }
  return out;
}

function correct(table, scores, o, out, r, from, to, clusters) {
  const tau = o.correct_threshold,
    role = out.role;
  let seeds = 0;
  out.unlikelihood.fill(0, from, to);
  role.fill(OTHER, from, to);
  if (from === to || Number.isNaN(scores.standard[from])) {
    out.likelihood.fill(1, from, to);
    out.salient[r] = 0;
    return;
  }
  for (let t = from; t < to; t++) {
    const c = Math.exp(scores.standard[t]);
    out.likelihood[t] = c;
    if (c > tau) {
      role[t] = SALIENT;
      seeds++;
    }
  }
  if (clusters) join(table, o, out, r, from, to);
  for (let t = from; t < to; t++) {
    const c = out.likelihood[t];
    if (role[t] === SALIENT) out.likelihood[t] = 1 + ((c - tau) / (1 - tau)) ** o.correct_boost_power;
    else out.likelihood[t] = (c / tau) ** (role[t] === JOINED ? o.correct_cluster_power : o.correct_other_power);
  }
  out.salient[r] = seeds;
}

function incorrect(table, scores, o, out, r, from, to, clusters) {
  const role = out.role,
    hasStandard = from < to && !Number.isNaN(scores.standard[from]);
  let flagged = 0;
  for (let t = from; t < to; t++) {
    const judge = scores.judge[t],
      overBase = Math.exp(judge - scores.base[t]);
    const losing =
      overBase > o.judge_base_ratio &&
      Math.exp(judge) > o.judge_minimum &&
      (!hasStandard || Math.exp(judge - scores.standard[t]) > o.judge_standard_ratio);
    role[t] = losing ? SALIENT : OTHER;
    out.unlikelihood[t] = losing ? o.unlikelihood_scale / (1 + Math.exp(o.judge_base_ratio - overBase)) : 0;
    out.likelihood[t] = 0;
    if (losing) flagged++;
  }
  out.salient[r] = flagged;
  if (!hasStandard || !o.imitate_incorrect || flagged / (to - from) > o.imitate_flagged_share) return;
  if (clusters) join(table, o, out, r, from, to);
  for (let t = from; t < to; t++) if (role[t] === OTHER) out.likelihood[t] = Math.exp(scores.standard[t] / 2);
}

// log(1 - exp(logp)) without loss of digits at either end.
export function logComplement(logp) {
  return logp > -Math.LN2 ? Math.log(-Math.expm1(logp)) : Math.log1p(-Math.exp(logp));
}

// How far the walk of a token goes depends on its hidden states and on three options only, so it is kept until one of these changes.
function forgetOthers(table, o) {
  const key = `${o.cluster} ${o.cluster_distance} ${o.cluster_max_span}`;
  if (table.reach.key === key) return;
  table.reach.key = key;
  table.reach.low.fill(-1);
}

function join(table, o, out, r, from, to) {
  const products = table.products[r],
    length = to - from,
    { low, high, unknown } = table.reach;
  if (products === null) {
    out.unknown[r] = 1;
    return;
  }
  const span = Math.min(o.cluster_max_span ?? length, length - 1);
  const change = new Int32Array(length + 1); // of how many walks cover a token, from one to the next
  let walks = null;
  for (let t = from; t < to; t++) {
    if (out.role[t] !== SALIENT) continue;
    if (low[t] < 0) {
      walks ??= prepareWalks(products, length, o);
      (o.cluster === "like" ? walkLike : walkUnlike)(walks, t - from, span, t, table.reach);
    }
    out.unknown[r] |= unknown[t];
    change[low[t]]++;
    change[high[t] + 1]--;
  }
  for (let x = 0, covering = 0; x < length; x++) {
    covering += change[x];
    if (covering > 0 && out.role[from + x] === OTHER) out.role[from + x] = JOINED;
  }
}

// What all walks over a record share. With `like` the centre is the mean of all states so far, so its product with the next state is a sum
// of products; with `unlike` each step halves what was in the centre before. Both sums are the same for every seed but for its own share,
// so they are added up once for each state: over the states `before` it and those `after` it, by the number of states.
function prepareWalks(products, length, o) {
  if (products.sums?.cluster !== o.cluster) products.sums = addUp(products, length, o.cluster);
  const walks = { ...products.sums, values: products.values, width: products.width, length, limit: o.cluster_distance };
  if (o.cluster === "unlike" && walks.width > FADED) {
    walks.leftEnd = endings(walks, walks.after, -1);
    walks.rightEnd = endings(walks, walks.before, 1);
  }
  return walks;
}

function addUp({ values, width }, length, cluster) {
  const before = new Float64Array(length * width),
    after = new Float64Array(length * width),
    sizes = new Float64Array(length);
  for (let x = 0; x < length; x++) {
    let left = 0,
      right = 0;
    sizes[x] = Math.sqrt(values[x * width]);
    for (let d = 1; d < width; d++) {
      const share = cluster === "like" ? 1 : d < HALVES.length ? HALVES[d] : 0;
      if (x - d >= 0) left += share * values[x * width + d];
      if (x + d < length) right += share * values[(x + d) * width + d];
      before[x * width + d] = left;
      after[x * width + d] = right;
    }
  }
  return { cluster, before, after, sizes };
}

// Where a released walk ends that has come to each token and has forgotten its seed: it goes on as every other one there.
function endings({ width, length, limit, sizes }, sums, direction) {
  const ends = new Int32Array(length),
    continues = new Uint8Array(length);
  let centre = 0;
  // The centre of a walk in one direction is that of the states which it comes from.
  for (let n = 0; n < length; n++) {
    const x = direction < 0 ? length - 1 - n : n,
      next = x + direction;
    const square = sizes[x] ** 2;
    centre = n === 0 ? square : (centre + 2 * sums[x * width + width - 1] + square) / 4;
    if (next >= 0 && next < length) {
      continues[x] = 1 - sums[next * width + width - 1] / Math.max(Math.sqrt(centre) * sizes[next], 1e-8) > limit ? 1 : 0;
    }
  }
  for (let n = 0; n < length; n++) {
    const x = direction < 0 ? n : length - 1 - n;
    ends[x] = continues[x] ? ends[x + direction] : x;
  }
  return ends;
}

function walkLike({ width, length, limit, before, after, sizes }, seed, span, t, reach) {
  reach.unknown[t] = 0;
  for (let direction = -1; direction <= 1; direction += 2) {
    const sums = direction < 0 ? after : before;
    let far = 0,
      centre = sizes[seed] ** 2; // squared length of the sum of the states so far
    for (let step = 1; step <= span; step++) {
      const x = seed + direction * step;
      if (x < 0 || x >= length) break;
      if (step >= width) {
        reach.unknown[t] = 1;
        break;
      }
      const dot = sums[x * width + step];
      if (1 - dot / Math.max(Math.sqrt(centre) * sizes[x], 1e-8) > limit) break;
      far = step;
      centre += 2 * dot + sizes[x] ** 2;
    }
    if (direction < 0) reach.low[t] = seed - far;
    else reach.high[t] = seed + far;
  }
}

function walkUnlike(walks, seed, span, t, reach) {
  const { values, width, length, limit, before, after, sizes, leftEnd, rightEnd } = walks;
  reach.unknown[t] = 0;
  let left = 0,
    centre = sizes[seed] ** 2;
  for (let step = 1; step <= span && step <= seed; step++) {
    const x = seed - step;
    if (step > FADED && leftEnd) {
      left = Math.min(span, seed - leftEnd[x + 1]);
      centre = NaN;
      break;
    }
    if (step >= width) {
      reach.unknown[t] = 1;
      break;
    }
    const dot = after[x * width + step] + HALVES[step] * values[seed * width + step];
    if (!(1 - dot / Math.max(Math.sqrt(centre) * sizes[x], 1e-8) > limit)) break;
    left = step;
    centre = (centre + 2 * dot + sizes[x] ** 2) / 4;
  }
  if (Number.isNaN(centre)) centre = fadedCentre(walks, seed - left);
  reach.low[t] = seed - left;
  // The right walk goes on with the centre of the left one, which fades in turn. Products of states that are too far from each other are
  // not recorded: they lie between bounds, and only where these leave a step open the walk is unknown.
  let right = 0,
    slack = 0;
  for (let step = 1; step <= span && seed + step < length; step++) {
    const x = seed + step,
      size = sizes[x];
    if (step > FADED && rightEnd) {
      right = Math.min(span, rightEnd[x - 1] - seed);
      break;
    }
    if (step > width) {
      reach.unknown[t] = 1;
      break;
    }
    let dot = before[x * width + step - 1],
      open = 0;
    for (let m = left; m >= 0 && step + left - m <= FADED; m--) {
      const share = HALVES[step - 1 + (m === 0 ? left : left - m + 1)];
      if (step + m < width) dot += share * values[x * width + step + m];
      else open += share * sizes[seed - m];
    }
    open *= size;
    const distance = 1 - dot / Math.max(Math.sqrt(centre) * size, 1e-8);
    if ((open > 0 || slack > 0) && Math.abs(distance - limit) <= doubt(dot, open, centre, slack, size, distance)) {
      reach.unknown[t] = 1;
      break;
    }
    if (!(distance > limit)) break;
    right = step;
    centre = (centre + 2 * dot + size ** 2) / 4;
    slack = (slack + 2 * open) / 4;
  }
  reach.high[t] = seed + right;
}

// The squared length of the centre of a left walk that has come to a state and has forgotten its seed.
function fadedCentre({ values, width, length }, x) {
  let square = 0;
  for (let a = 0; a < FADED && x + a < length; a++) {
    for (let b = 0; a + b < FADED && x + b < length; b++) {
      const high = x + Math.max(a, b);
      square += HALVES[a + b + 2] * values[high * width + Math.abs(a - b)];
    }
  }
  return square;
}

// How far a distance may be from the true one, where the product is known to `open` and the squared length of the centre to `slack`.
function doubt(dot, open, centre, slack, size, distance) {
  if (slack >= centre) return 2;
  let worst = 0;
  for (const sign of [-1, 1]) {
    const product = dot + sign * open,
      square = centre + (sign * product > 0 ? -slack : slack);
    const cosine = product / (Math.sqrt(square) * size);
    worst = Math.max(worst, Math.abs(1 - Math.max(-1, Math.min(1, cosine)) - distance));
  }
  return worst;
}
