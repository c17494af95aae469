export function submitPage(place) {
  place.append("…");
}
