"use strict";
// What is shown comes from the block `data` alone, and tokens become text, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const texts = { batch: data.tokens, source: data.source }, explained = data.source.length ? "source" : "batch";
const placed = data.places.length === data.tokens.length;  // the lens has a column for each token
const dark = matchMedia("(prefers-color-scheme: dark)");
const scales = {}, maps = data.layers.map((layer) => bytes(layer.map));
for (const [kind, themes] of Object.entries(data.scales))
  scales[kind] = { light: bytes(themes.light), dark: bytes(themes.dark) };
const opening = { side: "batch", position: data.at ?? data.tokens.length - 1 };
const state = { layer: data.layer, head: data.head, chosen: opening, kept: opening, way: "sees", shade: "best" };

const make = (name, text, parent) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
};
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
const quoted = (token) => `“${visible(token)}”`;
const number = (x, digits = 4) => x.toFixed(digits).replace("-", "−");
const percent = (p) => (p >= 0.0995 || p === 0 ? Math.round(100 * p) : (100 * p).toPrecision(2)) + "\u00a0%";
const at = (side, position) => `${position} ${quoted(texts[side][position])}`;

// Colours -------------------------------------------------------------------------------------------------------------

const colour = (kind, level) => {
  const scale = scales[kind][dark.matches ? "dark" : "light"], i = 3 * Math.max(0, Math.min(255, Math.round(level)));
  return [scale[i], scale[i + 1], scale[i + 2]];
};
const luminance = (rgb) => {  // WCAG 2.2
  const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paint = (element, kind, level) => {
  const rgb = colour(kind, level);
  element.style.backgroundColor = `rgb(${rgb.join(" ")})`;
  element.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff";
};
const legend = (id, kind, what, ticks) => {  // ticks: [place from 0 to 1, text]
  const bar = document.createElement("div"), canvas = make("canvas", undefined, bar);
  canvas.width = 256; canvas.height = 1;
  const context = canvas.getContext("2d"), image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...colour(kind, i), 255], 4 * i);
  context.putImageData(image, 0, 0);
  for (const [place, text] of ticks) make("span", text, bar).style.left = `${100 * place}%`;
  $(id).replaceChildren(make("span", what), bar);
};

// A row of tokens of which one is reached by Tab, and the others by arrow keys ------------------------------------------

const row = (id, side, look, keep) => {
  const box = $(id), length = texts[side].length, buttons = texts[side].map((token, position) => {
    const button = make("button", visible(token), box);
    button.type = "button";
    button.className = "token" + (side === "batch" && position === data.at ? " asked" : "");
    button.addEventListener("mouseenter", () => look(position));
    button.addEventListener("focus", () => look(position));
    button.addEventListener("click", () => keep(position));
    return button;
  });
  const reach = (position) => buttons.forEach((button, other) => { button.tabIndex = other === position ? 0 : -1; });
  reach(side === opening.side ? opening.position : length - 1);
  box.addEventListener("focusin", (event) => reach(buttons.indexOf(event.target)));
  box.addEventListener("keydown", (event) => {
    const now = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: length - 1 }[event.key];
    if (to === undefined || now < 0) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(length - 1, to))].focus();
  });
  return buttons;
};

// What the answer rests on ----------------------------------------------------------------------------------------------

const ig = data.attribution, most = Math.max(...ig.values.map(Math.abs), 1e-12);
const says = (position) => {
  $("given-readout").textContent =
    `Position ${at(explained, position)} adds ${number(ig.values[position])} to the ${ig.score} of ${quoted(ig.output)}.`;
};
const given = row("given", explained, says, says);
given.forEach((button, position) => {
  button.setAttribute("aria-label", `${texts[explained][position]}, adds ${number(ig.values[position], 3)}`);
});
$("model").textContent = data.model;
$("lead").textContent = `The model is asked ${data.question}. Explained is ${quoted(ig.output)}, to which it gives ` +
  `${percent(ig.probability)}.`;
$("account").textContent = `Its ${ig.score} is ${number(ig.value)}; where the ${explained === "source" ? "source" : "text"} is replaced by ${ig.baseline}, it is ` +
  `${number(ig.baseline_value)}. What the tokens add makes ${number(ig.total)} of the difference of ` +
  `${number(ig.difference)} (${ig.steps} gradients).`;
const drawGiven = () => {
  given.forEach((button, position) => paint(button, "sign", 127.5 + 127.5 * ig.values[position] / most));
  legend("sign-legend", "sign", `against and for, in ${ig.score}`,
    [[0, `−${most.toPrecision(3)}`], [0.5, "0"], [1, `+${most.toPrecision(3)}`]]);
};

// Who attends to whom ---------------------------------------------------------------------------------------------------

const sizes = (layer) => [texts[data.layers[layer].rows].length, texts[data.layers[layer].columns].length];
const weight = (layer, head, from, to) => {  // a probability, of which the map has the root; head 0: the mean
  const heads = data.layers[layer].heads, map = maps[layer], [rows, columns] = sizes(layer);
  const one = rows * columns, cell = from * columns + to;
  let sum = 0;
  for (let i = head ? head - 1 : 0; i < (head || heads); i++) sum += (map[i * one + cell] / 255) ** 2;
  return head ? sum : sum / heads;
};
const shade = (p) => 255 * Math.sqrt(p);  // so that small ones can be told apart
const roots = [0, 5, 25, 50, 100].map((p) => [Math.sqrt(p / 100), `${p}\u00a0%`]);
const drawMap = (canvas, layer, head) => {
  const [rows, columns] = sizes(layer);
  canvas.width = columns; canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  for (let from = 0, i = 0; from < rows; from++)
    for (let to = 0; to < columns; to++, i += 4) {
      const [r, g, b] = colour("amount", shade(weight(layer, head, from, to)));
      image.data[i] = r; image.data[i + 1] = g; image.data[i + 2] = b; image.data[i + 3] = 255;
    }
  context.putImageData(image, 0, 0);
};
const headName = () => (state.head ? `head ${state.head}` : "the mean of its heads");
const isChosen = (one, side, position) => one.side === side && one.position === position;
const drawTokens = () => {  // between two texts the side of the chosen token says whether it sees or is seen
  const { layer, head, chosen } = state, { rows, columns } = data.layers[layer], two = rows !== columns;
  const sees = two ? chosen.side === rows : state.way === "sees", other = sees ? columns : rows;
  const levels = texts[other].map((_, position) => (sees ? weight(layer, head, chosen.position, position)
    : weight(layer, head, position, chosen.position)));
  for (const [side, buttons] of Object.entries(attended)) buttons.forEach((button, position) => {
    const level = side === other ? levels[position] : 0;
    paint(button, "amount", shade(level));
    button.classList.toggle("chosen", isChosen(chosen, side, position));
    button.setAttribute("aria-pressed", isChosen(state.kept, side, position));
    button.setAttribute("aria-label", `${texts[side][position]}${side === other ? `, ${percent(level)}` : ""}`);
  });
  const best = levels.map((level, position) => [level, position]).sort((a, b) => b[0] - a[0]).slice(0, 5)
    .filter(([level]) => level > 0).map(([level, position]) => `${at(other, position)} ${percent(level)}`);
  $("attended-readout").textContent = `Position ${at(chosen.side, chosen.position)} ${sees ? "sees" : "is seen by"} ` +
    `${best.join(", ") || "nobody"}.`;
  document.querySelectorAll("#lens .chosen").forEach((cell) => cell.classList.remove("chosen"));
  if (placed && chosen.side === "batch") document.querySelectorAll(`#lens [data-place="${chosen.position}"]`)
    .forEach((cell) => cell.classList.add("chosen"));
};
const showSides = () => {  // those of the layer at hand; a token that is not of them is chosen no more
  const { rows, columns } = data.layers[state.layer];
  for (const [side, id] of [["batch", "attended"], ["source", "attended-source"]]) {
    $(id).hidden = side !== rows && side !== columns;
    $(`${id}-side`).hidden = $(id).hidden || !data.source.length;
  }
  $("ways").hidden = rows !== columns;
  if (state.chosen.side !== rows && state.chosen.side !== columns)
    state.chosen = state.kept = { side: rows, position: texts[rows].length - 1 };
};
const drawAttention = () => {
  if (!data.layers.length) return;
  showSides();
  drawMap($("map"), state.layer, state.head);
  $("map").setAttribute("aria-label",
    `Attention of ${data.layers[state.layer].called}, ${headName()}: ${sizes(state.layer).join(" by ")}`);
  document.querySelectorAll("#all button").forEach((button) => button.setAttribute("aria-pressed",
    Number(button.dataset.layer) === state.layer && Number(button.dataset.head) === state.head));
  drawTokens();
};
const look = (side, position) => { state.chosen = { side, position }; drawTokens(); };
const keep = (side, position) => { state.kept = { side, position }; look(side, position); };
const shows = (side) => data.layers.length && [data.layers[state.layer].rows, data.layers[state.layer].columns].includes(side);
const fillHeads = () => {
  const { heads, mean } = data.layers[state.layer], told = mean ? 0 : heads;
  state.head = told === 1 ? 1 : Math.min(state.head, told);
  const names = Array.from({ length: told }, (_, i) => [i + 1, String(i + 1)]);
  if (told !== 1) names.unshift([0, "mean of all"]);
  $("head").replaceChildren(...names.map(([value, text]) => Object.assign(make("option", text), { value })));
  $("head").value = state.head;
};
const attended = {};
const startAttention = () => {
  if (!data.layers.length) {
    $("attention").replaceChildren(make("h2", "Who attends to whom"), make("p", "This model has no attention."));
    return;
  }
  for (const [side, id] of [["batch", "attended"], ["source", "attended-source"]]) {
    attended[side] = row(id, side, (position) => look(side, position), (position) => keep(side, position));
    $(id).addEventListener("mouseleave", () => look(state.kept.side, state.kept.position));
  }
  data.layers.forEach((layer, index) => {
    const option = make("option", data.source.length ? `${index + 1}: ${layer.called}` : String(index + 1), $("layer"));
    option.value = index; option.title = layer.name;
  });
  $("layer").value = state.layer;
  fillHeads();
  $("layer").addEventListener("change", () => { state.layer = Number($("layer").value); fillHeads(); drawAttention(); });
  $("head").addEventListener("change", () => { state.head = Number($("head").value); drawAttention(); });
  document.querySelectorAll("[name=way]").forEach((input) =>
    input.addEventListener("change", () => { state.way = input.value; drawTokens(); }));
  const cell = (event) => {
    const box = $("map").getBoundingClientRect(), [rows, columns] = sizes(state.layer);
    const clip = (x, length) => Math.max(0, Math.min(length - 1, Math.floor(length * x)));
    return [clip((event.clientY - box.top) / box.height, rows), clip((event.clientX - box.left) / box.width, columns)];
  };
  $("map").addEventListener("mousemove", (event) => {
    const [from, to] = cell(event);
    const { rows, columns } = data.layers[state.layer];
    $("map-readout").textContent =
      `${at(rows, from)} looks at ${at(columns, to)}: ${percent(weight(state.layer, state.head, from, to))}.`;
  });
  $("map").addEventListener("click", (event) => {
    const { rows, columns } = data.layers[state.layer], [from, to] = cell(event);
    if (rows !== columns || state.way === "sees") keep(rows, from); else keep(columns, to);
  });
  const most = Math.max(...data.layers.map((layer) => layer.heads));
  $("all").style.gridTemplateColumns = `auto repeat(${most}, auto)`;
  data.layers.forEach((layer, index) => {
    make("span", data.source.length ? layer.called : String(index + 1), $("all"));
    for (let head = 1; head <= most; head++) {
      if (head > layer.heads) { make("span", "", $("all")); continue; }
      const button = make("button", undefined, $("all"));
      button.type = "button"; button.dataset.layer = index; button.dataset.head = layer.mean ? 0 : head;
      button.setAttribute("aria-label", `${layer.called}, ${layer.mean ? "mean of heads" : `head ${head}`}`);
      make("canvas", undefined, button);
      button.addEventListener("click", () => {
        state.layer = index; state.head = layer.mean ? 0 : head;
        $("layer").value = index; fillHeads(); drawAttention();
      });
    }
  });
  $("all-caption").textContent = `All layers (rows)${data.layers[0].mean ? "" : " and heads (columns)"}; one that is pressed is shown.`;
};
const drawAll = () => document.querySelectorAll("#all button").forEach((button) =>
  drawMap(button.firstChild, Number(button.dataset.layer), Number(button.dataset.head)));

// What each layer would say -----------------------------------------------------------------------------------------------

const cells = [];
const told = (index, place) => {
  const line = data.lens[index];
  const best = line.top[place].map(([word, p]) => `${quoted(data.words[word])} ${percent(p)}`).join(", ");
  const came = line.came[place] === null ? "" : `; what came had ${percent(line.came[place])}`;
  $("lens-readout").textContent = `${line.name}, at ${placed ? at("batch", place) : "the text"}: ${best}${came}.`;
};
const startLens = () => {
  const head = make("tr", undefined, make("thead", undefined, $("lens"))), body = make("tbody", undefined, $("lens"));
  make("th", "", head);
  data.places.forEach((place, index) => {
    const th = make("th", visible(place), head);
    th.scope = "col"; th.dataset.place = index;
  });
  data.lens.map((line, index) => [line, index]).reverse().forEach(([line, index]) => {
    const tr = make("tr", undefined, body);
    make("th", line.name, tr).scope = "row";
    line.top.forEach((best, place) => {
      const td = make("td", visible(data.words[best[0][0]]), tr);
      td.tabIndex = -1; td.dataset.place = place;
      const show = () => told(index, place);
      td.addEventListener("mouseenter", show); td.addEventListener("focus", show);
      td.addEventListener("click", () => { td.focus(); if (placed && shows("batch")) keep("batch", place); });
      cells.push({ td, best: best[0][1], came: line.came[place] });
    });
  });
  const first = data.lens.length - 1, place = data.at ?? 0;
  cells[place].td.tabIndex = 0;
  told(first, place);
  $("lens").addEventListener("keydown", (event) => {
    const now = cells.findIndex(({ td }) => td === document.activeElement), width = data.places.length;
    const to = now + ({ ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width }[event.key] ?? NaN);
    if (now < 0 || !(to >= 0 && to < cells.length)) return;
    event.preventDefault();
    cells[now].td.tabIndex = -1; cells[to].td.tabIndex = 0; cells[to].td.focus();
  });
  $("shades").hidden = cells.every(({ came }) => came === null);
  document.querySelectorAll("[name=shade]").forEach((input) =>
    input.addEventListener("change", () => { state.shade = input.value; drawLens(); }));
};
const drawLens = () => {
  cells.forEach((cell) => paint(cell.td, "amount", shade(cell[state.shade] ?? 0)));
  legend("lens-legend", "amount", "probability", roots);
};

// All of it -----------------------------------------------------------------------------------------------------------------

const draw = () => {
  drawGiven();
  if (data.layers.length) { drawAll(); drawAttention(); legend("amount-legend", "amount", "attention", roots); }
  drawLens();
};
$("limits").textContent = data.limits;
startLens();
startAttention();
says(ig.values.map(Math.abs).indexOf(Math.max(...ig.values.map(Math.abs))));
draw();
dark.addEventListener("change", draw);
