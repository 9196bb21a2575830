"use strict";
if (navigator.language.startsWith("zh")) document.getElementById("zh").checked = true;

for (const plot of document.querySelectorAll(".plot")) {
  const { axis, lines } = JSON.parse(plot.dataset.points);
  const area = plot.querySelector(".area");
  const cross = plot.querySelector(".cross");
  const readout = plot.parentElement.querySelector(".readout");
  const before = [...readout.childNodes];
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  let at = steps.length - 1;

  const nearest = (sorted, wanted) =>
    sorted.reduce((best, step, i) => (Math.abs(step - wanted) < Math.abs(sorted[best] - wanted) ? i : best), 0);

  const translated = ([en, zh]) =>
    [["en", en], ["zh", zh]].map(([lang, text]) => {
      const span = document.createElement("span");
      span.className = "t";
      span.lang = lang;
      span.textContent = text;
      return span;
    });

  const show = (index) => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[at];
    cross.hidden = false;
    cross.style.left = `${(100 * (step - axis[0])) / (axis[1] - axis[0])}%`;
    const parts = translated([`step ${step}`, `第 ${step} 步`]);
    for (const line of lines) {
      const point = nearest(line.steps, step);
      if (line.steps[point] !== step) continue;
      const value = document.createElement("b");
      value.textContent = line.values[point];
      parts.push(" · ", ...translated(line.label), " ", value);
    }
    readout.replaceChildren(...parts);
  };
  const hide = () => {
    cross.hidden = true;
    readout.replaceChildren(...before);
  };

  const follow = (event) => {
    const box = area.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    show(nearest(steps, axis[0] + share * (axis[1] - axis[0])));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && show(at));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}
