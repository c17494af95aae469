// The token weights of NLFT, from recorded scores and the options of a job: what edge_agent/training/methods/nlft.py computes,
// again for every position of a slider. No part of the page is known here.

export const OTHER = 0, JOINED = 1, SALIENT = 2;
const FADED = 31;  // steps after which a released walk has forgotten a token: 2^-31 of its centre

// Puts the records of a saliency document one after another into typed arrays. Step 0 is the scoring before training; each later
// step replaces what was scored again in its epoch.
export function prepare(saliency) {
  const records = saliency.records, starts = new Int32Array(records.length + 1);
  records.forEach((record, r) => { starts[r + 1] = starts[r] + record.tokens.length; });
  const tokens = starts[records.length];
  const epochs = [...new Set(records.flatMap((record) => record.rescored.map((scores) => scores.epoch)))].sort((a, b) => a - b);
  const steps = [scoresOf(records, starts, tokens, (record) => record)];
  for (const epoch of epochs) {
    steps.push(scoresOf(records, starts, tokens, (record) => record.rescored.findLast((scores) => scores.epoch <= epoch) ?? record));
  }
  const longest = records.reduce((most, record) => Math.max(most, record.tokens.length), 0);
  return {
    records, starts, tokens, epochs, steps, longest,
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
  const text = atob(record.products), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 4);
  for (let i = 0; i < values.length; i++) values[i] = view.getFloat32(4 * i, true);
  return { values, width: values.length / record.tokens.length };
}

export function results(table) {
  const tokens = table.tokens, records = table.records.length;
  return {
    likelihood: new Float64Array(tokens), unlikelihood: new Float64Array(tokens), loss: new Float64Array(tokens),
    role: new Uint8Array(tokens),
    recordLoss: new Float64Array(records), salient: new Int32Array(records), unknown: new Uint8Array(records),
  };
}

// Fills `out` with weights, roles and losses of all records under one set of options.
// `out.unknown` marks records whose clusters depend on hidden states that were not recorded.
export function weigh(table, step, options, out) {
  const scores = table.steps[step];
  const clusters = options.cluster !== "none";
  if (clusters) forgetOthers(table, options);
  for (let r = 0; r < table.records.length; r++) {
    const from = table.starts[r], to = table.starts[r + 1];
    out.unknown[r] = 0;
    if (table.incorrect[r]) incorrect(table, scores, options, out, r, from, to, clusters);
    else correct(table, scores, options, out, r, from, to, clusters);
    let loss = 0;
    for (let t = from; t < to; t++) {
      const up = out.likelihood[t], down = out.unlikelihood[t];
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
  const tau = o.correct_threshold, role = out.role;
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
    if (c > tau) { role[t] = SALIENT; seeds++; }
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
  const role = out.role, hasStandard = from < to && !Number.isNaN(scores.standard[from]);
  let flagged = 0;
  for (let t = from; t < to; t++) {
    const judge = scores.judge[t], overBase = Math.exp(judge - scores.base[t]);
    const losing = overBase > o.judge_base_ratio && Math.exp(judge) > o.judge_minimum
      && (!hasStandard || Math.exp(judge - scores.standard[t]) > o.judge_standard_ratio);
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
  const products = table.products[r], length = to - from, { low, high, unknown } = table.reach;
  if (products === null) { out.unknown[r] = 1; return; }
  const span = Math.min(o.cluster_max_span ?? length, length - 1);
  const change = new Int32Array(length + 1);  // of how many walks cover a token, from one to the next
  let walker = null;
  for (let t = from; t < to; t++) {
    if (out.role[t] !== SALIENT) continue;
    if (low[t] < 0) {
      walker ??= makeWalker(products, length, o);
      walker(t - from, span, t, table.reach);
    }
    out.unknown[r] |= unknown[t];
    change[low[t]]++;
    change[high[t] + 1]--;
  }
  for (let x = 0, walks = 0; x < length; x++) {
    walks += change[x];
    if (walks > 0 && out.role[from + x] === OTHER) out.role[from + x] = JOINED;
  }
}

// Returns the function that walks from a token and writes down how far. With `like` the centre is the mean of all states so far, so
// its product with the next state is a sum of products; with `unlike` each step halves what was in the centre before. Both sums are the
// same for every seed but for its own share, so they are added up once for each state.
function makeWalker({ values, width }, length, o) {
  const like = o.cluster === "like", before = new Float64Array(length * width), after = new Float64Array(length * width);
  for (let x = 0; x < length; x++) {
    let left = 0, right = 0;
    for (let d = 1; d < width; d++) {
      const share = like ? 1 : 2 ** -d;
      if (x - d >= 0) left += share * values[x * width + d];
      if (x + d < length) right += share * values[(x + d) * width + d];
      before[x * width + d] = left;
      after[x * width + d] = right;
    }
  }
  const product = (a, b) => (a > b ? values[a * width + a - b] : values[b * width + b - a]);
  const square = (x) => values[x * width];
  const walk = like ? walkLike : walkUnlike;
  return (seed, span, t, reach) => walk(seed, span, t, reach, { length, width, limit: o.cluster_distance, before, after, product, square });
}

function walkLike(seed, span, t, reach, { length, width, limit, before, after, square }) {
  reach.unknown[t] = 0;
  for (const direction of [-1, 1]) {
    let far = 0, centre = square(seed);  // squared length of the sum of the states so far
    for (let step = 1; step <= span; step++) {
      const x = seed + direction * step;
      if (x < 0 || x >= length) break;
      if (step >= width) { reach.unknown[t] = 1; break; }
      const dot = (direction < 0 ? after : before)[x * width + step];
      if (1 - cosine(dot, centre, square(x)) > limit) break;
      far = step;
      centre += 2 * dot + square(x);
    }
    if (direction < 0) reach.low[t] = seed - far;
    else reach.high[t] = seed + far;
  }
}

function walkUnlike(seed, span, t, reach, { length, width, limit, before, after, product, square }) {
  reach.unknown[t] = 0;
  let left = 0, right = 0, centre = square(seed);
  for (let step = 1; step <= span && step <= seed; step++) {
    const x = seed - step;
    if (step >= width && width <= FADED) { reach.unknown[t] = 1; break; }
    const dot = after[x * width + Math.min(step, width - 1)] + (step < width ? 2 ** -step * product(x, seed) : 0);
    if (!(1 - cosine(dot, centre, square(x)) > limit)) break;
    left = step;
    centre = (centre + 2 * dot + square(x)) / 4;
  }
  // What the left walk has left in the centre fades, too; where its products with the states to the right are not known, they lie between
  // bounds, and only where these leave the step open is the walk unknown.
  let slack = 0;
  for (let step = 1; step <= span && seed + step < length; step++) {
    const x = seed + step, size = Math.sqrt(square(x));
    if (step > width && width <= FADED) { reach.unknown[t] = 1; break; }
    let dot = step > 1 ? before[x * width + Math.min(step, width) - 1] : 0, open = 0;
    if (step <= FADED) {
      const kept = 2 ** (1 - step);
      for (let m = left; m >= 0 && m >= left - FADED; m--) {
        const share = kept * (m === 0 ? 2 ** -left : 2 ** (m - left - 1));
        if (step + m < width) dot += share * product(x, seed - m);
        else open += share * Math.sqrt(square(seed - m)) * size;
      }
    }
    const distance = 1 - cosine(dot, centre, square(x));
    const lost = open > 0 || slack > 0 ? doubt(dot, open, centre, slack, size, distance) : 0;
    if (Math.abs(distance - limit) <= lost) { reach.unknown[t] = 1; break; }
    if (!(distance > limit)) break;
    right = step;
    centre = (centre + 2 * dot + size * size) / 4;
    slack = (slack + 2 * open) / 4;
  }
  reach.low[t] = seed - left;
  reach.high[t] = seed + right;
}

// How far a distance may be from the true one, where the product is known to `open` and the squared length of the centre to `slack`.
function doubt(dot, open, centre, slack, size, distance) {
  if (slack >= centre) return 2;
  let worst = 0;
  for (const d of [dot - open, dot + open]) {
    for (const c of [centre - slack, centre + slack]) {
      const cos = Math.max(-1, Math.min(1, d / (Math.sqrt(c) * size)));
      worst = Math.max(worst, Math.abs(1 - cos - distance));
    }
  }
  return worst;
}

function cosine(dot, squareA, squareB) {
  return dot / Math.max(Math.sqrt(Math.max(squareA, 0) * squareB), 1e-8);
}
