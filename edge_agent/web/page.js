// The entry of the self-contained page: its data stand in the document.

import { mount } from "./saliency.js";

globalThis.saliencyMap = mount(document.getElementById("map"), JSON.parse(document.getElementById("data").textContent));
