// How an answer looks: the colour of its tokens, its flagged share, its name.

const FULL = 2; // a weight of 2 has the strongest colour
export const LEVELS = 8;
export const NEAR = 1e-9; // weights closer than this are the same
export const MODES = {
  weight: { label: "weight", low: "made unlikely", high: "imitated" },
  change: { label: "change", low: "lower than compared", high: "higher" },
  standard: { label: "c/b", low: "c below b", high: "c above b" },
  judge: { label: "j/b", low: "j above b", high: "j below b" },
};

// Signed degree of a token, from −1 to 1, in the chosen mode.
function degree({ state, table, now, then }, t) {
  const scores = table.steps[state.step];
  const fold = (logp) => (Number.isNaN(logp) ? 0 : logp / Math.log(16)); // sixteen times as likely is the strongest colour
  if (state.mode === "standard") return fold(scores.standard[t] - scores.base[t]);
  if (state.mode === "judge") return -fold(scores.judge[t] - scores.base[t]);
  const weight = now.likelihood[t] - now.unlikelihood[t];
  return (state.mode === "change" ? weight - (then.likelihood[t] - then.unlikelihood[t]) : weight) / FULL;
}

export function level(view, t) {
  const strength = degree(view, t),
    rounded = Math.min(LEVELS, Math.round(LEVELS * Math.abs(strength)));
  const shown = rounded === 0 && Math.abs(strength) > NEAR ? 1 : rounded;
  return shown === 0 ? 0 : strength > 0 ? shown : -shown;
}

export function levelClass(at) {
  return at === 0 ? "" : at > 0 ? `p${at}` : `n${-at}`;
}

// Of an incorrect answer; correct ones have no flagged tokens and come last.
export function flaggedShare({ table, now }, r) {
  return table.incorrect[r] ? now.salient[r] / (table.starts[r + 1] - table.starts[r]) : -1;
}

export function answerName(record) {
  return record.standard_answer ? `${record.id} · standard answer` : record.id;
}
