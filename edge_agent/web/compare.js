export function comparePage(place) {
  place.append("…");
}
