"use strict";
(function () {
  const snippets = JSON.parse(document.getElementById("routing-data").textContent);
  const blocks = Array.from(document.querySelectorAll(".snippet pre"), (pre) => Array.from(pre.children));
  const readout = document.getElementById("readout");
  const only = document.head.appendChild(document.createElement("style"));

  // The same words as the page was written with: see text.choices.
  function title(snippet, layer, i) {
    const kept = snippet.kept[layer][i];
    const parts = snippet.expert[layer][i].map((expert, k) =>
      `expert ${expert}, weight ${(snippet.percent[layer][i][k] / 100).toFixed(2)}${kept[k] ? "" : " (dropped)"}`)
      .filter((_, k) => snippet.expert[layer][i][k] >= 0);
    if (!parts.length) parts.push("no expert");
    const more = snippet.bytes[i] > 1 ? `; first of ${snippet.bytes[i]} bytes` : "";
    return parts.join("; ") + more;
  }

  function show(layer) {
    snippets.forEach((snippet, s) => blocks[s].forEach((span, i) => {
      const first = snippet.expert[layer][i][0];
      span.className = first < 0 ? "x" : `e${first}${snippet.kept[layer][i].some(Boolean) ? "" : " x"}`;
      span.title = title(snippet, layer, i);
    }));
  }

  document.querySelectorAll("input[name=layer]").forEach((input) => {
    if (input.checked) show(Number(input.value)); // A browser may restore another choice on reload.
    input.addEventListener("change", () => show(Number(input.value)));
  });

  const chips = Array.from(document.querySelectorAll(".chip"));
  chips.forEach((chip) => chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    chips.forEach((other) => other.setAttribute("aria-pressed", String(on && other === chip)));
    only.textContent = on ? `.snippet pre span:not(.e${chip.value}) { opacity: .2; }` : "";
  }));

  function tell(event) {
    const span = event.target.closest(".snippet pre span");
    if (span) readout.textContent = `“${span.textContent.trim() || "space"}” went to ${span.title}.`;
  }
  document.addEventListener("pointerover", tell);
  document.addEventListener("click", tell);
})();
