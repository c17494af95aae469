// NLFT's options by name: the defaults, and where the method's released code differs from them.

export const CORRECTED = {
  standard_answers: true,
  repair: true,
  turning_ratio: 0.1,
  references: "once",
  correct_threshold: 0.95,
  correct_boost_power: 5,
  correct_cluster_power: 0.3,
  correct_other_power: 0.6,
  judge_base_ratio: 1.5,
  judge_standard_ratio: 1.5,
  judge_minimum: 0.01,
  unlikelihood_scale: 2,
  imitate_incorrect: false,
  imitate_flagged_share: 0.06,
  cluster: "none",
  cluster_distance: 0.4,
  cluster_max_span: 32,
};
export const AS_RELEASED = {
  standard_answers: false,
  repair: false,
  references: "live",
  imitate_incorrect: true,
  cluster: "unlike",
  cluster_max_span: null,
};
