// Numbers with their units, as people read them.

import { count, number } from "./dom.js";

const MISSING = "–";

export function bytes(n) {
  if (n === null || n === undefined) return MISSING;
  for (const [unit, size] of [
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ])
    if (Math.abs(n) >= size) return `${trim(n / size)} ${unit}`;
  return `${count(n)} B`;
}

function trim(x) {
  return x >= 99.5 ? count(Math.round(x)) : x.toFixed(1).replace(/\.0$/, "");
}

export function seconds(s) {
  if (s === null || s === undefined) return MISSING;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  const minutes = Math.floor(s / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(s - 60 * minutes)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes - 60 * hours} min` : `${count(Math.round(hours / 24))} days`;
}

export function joules(j) {
  if (j === null || j === undefined) return MISSING;
  return j >= 1e6 ? `${trim(j / 1e6)} MJ` : j >= 1e3 ? `${trim(j / 1e3)} kJ` : `${trim(j)} J`;
}

export function rate(x) {
  if (x === 0) return "0";
  return x === null || x === undefined ? MISSING : x >= 100 ? count(Math.round(x)) : number(x, 1);
}

// A share as per cent, with one digit after the point.
export function share(x) {
  return x === null || x === undefined ? MISSING : `${(100 * x).toFixed(1).replace("-", "−")} %`;
}

export function points(x) {
  return `${x < 0 ? "−" : "+"}${Math.abs(100 * x).toFixed(1)}`;
}

// A reading of a sensor: its value with a unit, or a dash.
export function reading(sensor, unit, digits = 0) {
  return sensor?.value === null || sensor?.value === undefined ? MISSING : `${number(sensor.value, digits)} ${unit}`;
}

// A moment, in the reader's own time: with its day where that is not today.
export function moment(time) {
  const at = new Date(1000 * time),
    today = at.toDateString() === new Date().toDateString();
  return today ? at.toLocaleTimeString("en-GB") : `${at.toLocaleDateString("en-CA")} ${at.toLocaleTimeString("en-GB").slice(0, 5)}`;
}
