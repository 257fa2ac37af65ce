"use strict";
// The page of attention: reads its data once, then draws what is chosen: a head, a query's row, a key in it.
// T tokens, L layers, H heads, K weights kept of each row (0: all of them)

const byId = (id) => document.getElementById(id);
const page = JSON.parse(byId("data").textContent);
const { T, L, H, K, words, levels } = page;
const chosen = { head: page.head, query: Math.min(T - 1, 24), key: 0, pinned: false };

// ---- numbers and texts ----------------------------------------------------------------------------------------------

function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}
const shorts = (text) => new Uint16Array(bytesOf(text).buffer);
const integers = (text) => new Uint32Array(bytesOf(text).buffer);
const unpacked = ({ low, step, numbers }) => Float32Array.from(shorts(numbers), (n) => low + step * n);

const codes = bytesOf(page.codes); // of each head, row after row: the triangle, or K of each row
const keys = K ? shorts(page.keys) : null;
const logSums = unpacked(page.logSums); // [L, H, T]
const valueNorms = unpacked(page.valueNorms); // [L, H, T]
const likeliest = integers(page.likeliest); // [L+1, T, n], in page.vocabulary
const probability = unpacked(page.probability);
const divergence = unpacked(page.divergence); // [L+1, T]
const nLikeliest = likeliest.length / ((L + 1) * T);

/** The weights of a query on keys 0 .. query; NaN for those that were left out. */
function weightsOf(head, query) {
  const row = new Float32Array(query + 1);
  if (!K) {
    const start = (head * T * (T + 1)) / 2 + (query * (query + 1)) / 2;
    for (let key = 0; key <= query; key++) row[key] = levels[codes[start + key]];
    return row;
  }
  if (query + 1 > K) row.fill(NaN, 1); // the first is always kept
  const start = (head * T + query) * K;
  for (let i = start; i < start + K; i++) if (codes[i]) row[keys[i]] = levels[codes[i]];
  return row;
}

const formats = new Map();
function figure(x, digits = 3, sign = "auto") {
  const name = `${digits} ${sign}`;
  if (!formats.has(name)) {
    const options = { minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: sign };
    formats.set(name, new Intl.NumberFormat(page.language, options));
  }
  return formats.get(name).format(x);
}
const percent = (x) => `${figure(100 * x, 1)} %`;
const said = (sentence, parts) => sentence.replace(/\{(\w+)\}/g, (_, name) => parts[name]);
const tokenOf = (position) => page.vocabulary[page.text[position]];
const named = (position) => `${position + 1} «${tokenOf(position)}»`;
const headName = (head) => said(words.headName, { layer: Math.floor(head / H) + 1, head: (head % H) + 1 });
const weightShown = (w) => (Number.isNaN(w) ? words.leftOut : w ? (w < 0.0005 ? w.toExponential(0) : figure(w)) : "0");

function scoreShown(w, head, query) {
  if (Number.isNaN(w)) return words.leftOut;
  const sum = logSums[head * T + query];
  return w ? figure(Math.log(w) + sum, 2) : `< ${figure(Math.log(levels[1]) + sum, 1)}`;
}
const pushShown = (w, head, key) => (Number.isNaN(w) ? words.leftOut : figure(w * valueNorms[head * T + key]));

// ---- pieces of the page ---------------------------------------------------------------------------------------------

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** rows of cells: the first heads its row; a cell is a text, or [text, class]. */
function fillTable(table, caption, heads, rows) {
  const cell = (value, i) => {
    const [text, kind] = Array.isArray(value) ? value : [value, ""];
    const element = made(i ? "td" : "th", { className: kind, textContent: text });
    if (!i) element.scope = "row";
    return element;
  };
  const top = made("tr", {}, ...heads.map((text) => made("th", { textContent: text, scope: "col" })));
  table.replaceChildren(
    made("caption", { textContent: caption }),
    made("thead", {}, top),
    made("tbody", {}, ...rows.map((row) => made("tr", {}, ...row.map(cell)))),
  );
}

/** A box of options with one stop for Tab, in which arrow keys, Home, End, a click or a touch choose. */
function choices(box, options, choose, columns = () => 1) {
  let marked = null;
  const inOrder = () => [...box.children];
  options.forEach((option, i) => {
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.tabIndex = -1;
    option.number = i;
  });
  box.replaceChildren(...options);
  box.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (option) choose(option.number);
  });
  box.addEventListener("keydown", (event) => {
    const all = inOrder();
    const at = all.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns(), Home: -at, End: all.length - 1 - at };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const next = all[Math.max(0, Math.min(all.length - 1, at + steps[event.key]))];
    choose(next.number);
    next.focus();
  });
  return function mark(number) {
    marked?.setAttribute("aria-selected", "false");
    if (marked) marked.tabIndex = -1;
    marked = options[number];
    marked.setAttribute("aria-selected", "true");
    marked.tabIndex = 0;
    const top = marked.offsetTop - box.offsetTop; // moves the box alone, and not the page
    if (top < box.scrollTop || top + marked.offsetHeight > box.scrollTop + box.clientHeight) {
      box.scrollTop = top - box.clientHeight / 2;
    }
  };
}

/** A text that is read out, and not seen. */
const heard = (textContent) => made("span", { className: "heard", textContent });

/** An option: number, token and whether it is a part of a character; then what `show` says of it: a name, a figure. */
function tokenOption(position) {
  const token = made("span", { className: "token", textContent: tokenOf(position) });
  const whole = page.pieces[position];
  const part = whole === undefined ? "" : `, ${whole ? said(words.pieceOf, { whole }) : words.piece}`;
  if (part) {
    token.classList.add("piece");
    token.title = part.slice(2);
  }
  const [name, value] = [heard(""), made("span", { className: "figure" })];
  const option = made("div", {}, heard(`${position + 1} `), token, heard(`${part}: `), name, value);
  const now = ["", ""];
  option.show = (what, text) => {
    if (now[0] !== what) name.textContent = `${(now[0] = what)} `;
    if (now[1] !== text) value.textContent = now[1] = text;
  };
  return option;
}

// ---- colours --------------------------------------------------------------------------------------------------------

const ON_PAPER = { low: "#ffffff", middle: "#6aa5dc", high: "#08306b", hatch: "#b9c1c9", absent: "#e2ddd5", page: "#ffffff", ink: "#000000", mark: "#b3450a" };
let colours, shades;

function readColours(given) {
  const style = getComputedStyle(document.documentElement);
  colours = given ?? Object.fromEntries(Object.keys(ON_PAPER).map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const [low, middle, high] = ["low", "middle", "high"].map((name) => rgb(colours[name]));
  shades = Uint32Array.from(levels, (level) => {
    const x = 2 * Math.sqrt(level);
    const [from, to, share] = x < 1 ? [low, middle, x] : [middle, high, x - 1];
    return pixel(from.map((c, i) => Math.round(c + (to[i] - c) * share)));
  });
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const pixel = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // as little-endian memory has it

/** Calls see(query, key, code) for each stored weight of a head. */
function eachStored(head, see) {
  let i = K ? head * T * K : (head * T * (T + 1)) / 2;
  for (let query = 0; query < T; query++) {
    if (K) for (let n = 0; n < K; n++, i++) codes[i] && see(query, keys[i], codes[i]);
    else for (let key = 0; key <= query; key++, i++) see(query, key, codes[i]);
  }
}

/** A canvas of size x size pixels: each the largest weight of its cells; nothing where all are masked. */
function picture(canvas, head, size) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  const largest = new Uint8Array(size * size);
  const at = Uint32Array.from({ length: T }, (_, n) => Math.floor((n * size) / T));
  eachStored(head, (query, key, code) => {
    const place = at[query] * size + at[key];
    if (code > largest[place]) largest[place] = code;
  });
  const absent = pixel(rgb(colours.absent));
  for (let y = 0; y < size; y++) {
    const isWhole = !K || (y + 1) * (T / size) <= K; // nothing of these rows was left out
    for (let x = 0; x <= y; x++) {
      const code = largest[y * size + x];
      pixels[y * size + x] = code || isWhole ? shades[code] : absent;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// ---- the text: a token's loss ---------------------------------------------------------------------------------------

const stripOptions = Array.from({ length: T }, (_, position) => tokenOption(position));
const markQuery = choices(byId("strip"), stripOptions, (query) => choose({ query, key: heaviest(chosen.head, query) }));

function showStrip(what) {
  const found = page[what];
  const most = Math.max(...found.map((x) => Math.abs(x ?? 0)), 1e-9);
  stripOptions.forEach((option, position) => {
    const x = found[position];
    const shown = x === null ? "–" : figure(x, 2, what === "difference" ? "exceptZero" : "auto");
    option.style.setProperty("--share", `${(60 * Math.abs(x ?? 0)) / most}%`);
    option.show(x === null ? words.noLoss : words[what], shown);
  });
  byId("loss-low").textContent = `${words[what]}: ${figure(0, 1)}`;
  byId("loss-high").textContent = `${figure(most, 1)} ${words.nats}`;
}
if (page.difference) {
  byId("versus").hidden = false;
  const select = byId("strip-shows");
  for (const what of ["loss", "difference"]) select.append(made("option", { value: what, textContent: words[what] }));
  select.addEventListener("change", () => showStrip(select.value));
}

// ---- all heads ------------------------------------------------------------------------------------------------------

const headOptions = Array.from({ length: L * H }, (_, head) =>
  made("div", {}, made("canvas", { className: "masked" }), made("span", { className: "figure" }), heard(` ${headSaid(head)}`)),
);
let columns = H;
const markHead = choices(byId("heads"), headOptions, (head) => choose({ head }), () => columns);

function figuresOf(head) {
  return { entropy: figure(page.entropy[head], 2), distance: figure(page.distance[head], 1), first: percent(page.first[head]) };
}
function headSaid(head) {
  return `${headName(head)}: ${said(words.headSays, figuresOf(head))}`;
}
function sortHeads() {
  const by = byId("sort").value;
  const order = [...headOptions.keys()];
  if (by !== "place") order.sort((a, b) => (by === "entropy" ? 1 : -1) * (page[by][a] - page[by][b]));
  const box = byId("heads");
  columns = by === "place" ? H : Math.max(1, Math.min(order.length, Math.floor((box.parentElement.clientWidth - 6) / 66)));
  box.className = by === "place" ? "by-place" : "";
  box.style.gridTemplateColumns = `repeat(${columns}, minmax(26px, ${by === "place" ? 78 : 63}px))`;
  for (const head of order) {
    const place = `${Math.floor(head / H) + 1}·${(head % H) + 1}`;
    headOptions[head].querySelector(".figure").textContent = by === "place" ? place : `${place}: ${figuresOf(head)[by]}`;
  }
  box.replaceChildren(...order.map((head) => headOptions[head]));
  if (byId("heads-details").open) fillHeadsTable(order);
}
function fillHeadsTable(order = headOptions.map((_, head) => head)) {
  const rows = order.map((head) => [headName(head), ...Object.values(figuresOf(head))]);
  fillTable(byId("heads-table"), words.headsTable, [words.head, words.entropy, words.distance, words.first], rows);
}
byId("sort").addEventListener("change", sortHeads);
byId("heads-details").addEventListener("toggle", sortHeads);

// ---- one head in full -----------------------------------------------------------------------------------------------

const matrix = byId("matrix");
const labelled = T <= 40; // more would not be readable
let frame = { left: 0, top: 0, size: 1 }; // where the weights are on the canvas, in CSS pixels

function drawMatrix() {
  const width = matrix.clientWidth;
  const scale = window.devicePixelRatio || 1;
  if (matrix.width !== Math.round(width * scale)) matrix.width = matrix.height = Math.round(width * scale);
  const margin = labelled ? Math.min(width / 4, 90) : 0;
  const size = width - margin - 1;
  frame = { left: margin, top: margin, size };
  const cell = size / T;
  const context = matrix.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, width);
  context.fillStyle = hatched(context);
  context.fillRect(margin, margin, size, size);
  context.imageSmoothingEnabled = false;
  const pixels = Math.min(T, Math.floor(size * scale)); // of more, each shows the largest of its cells
  context.drawImage(picture(made("canvas"), chosen.head, pixels), margin, margin, size, size);
  context.strokeStyle = colours.hatch;
  context.strokeRect(margin, margin, size, size);
  if (labelled) drawLabels(context, margin, cell);
}
/** The chosen row and cell, as boxes above the canvas: to move them is quick. */
function markCell() {
  const cell = frame.size / T;
  const place = (mark, x, y, width, height) => {
    mark.style.transform = `translate(${x}px, ${y}px)`;
    mark.style.width = `${width}px`;
    mark.style.height = `${height}px`;
  };
  const [x, y] = [frame.left + chosen.key * cell, frame.top + chosen.query * cell];
  place(byId("row-mark"), frame.left - 1, y - 1, frame.size + 2, cell + 2);
  const more = Math.max(2, (7 - cell) / 2); // so that a small cell's box is seen
  place(byId("cell-mark"), x - more, y - more, cell + 2 * more, cell + 2 * more);
}
function hatched(context) {
  const tile = made("canvas", { width: 6, height: 6 });
  const pen = tile.getContext("2d");
  pen.fillStyle = colours.page;
  pen.fillRect(0, 0, 6, 6);
  pen.strokeStyle = colours.hatch;
  pen.beginPath();
  for (const shift of [-6, 0, 6]) {
    pen.moveTo(shift, 6);
    pen.lineTo(shift + 6, 0);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}
function drawLabels(context, margin, cell) {
  context.font = `${Math.max(8, Math.min(13, cell * 0.8))}px ui-monospace, Menlo, Consolas, monospace`;
  context.textBaseline = "middle";
  for (let n = 0; n < T; n++) {
    const middle = margin + (n + 0.5) * cell;
    context.fillStyle = colours.ink;
    context.textAlign = "right";
    context.fillText(tokenOf(n), margin - 4, middle, margin - 6);
    context.save();
    context.translate(middle, margin - 4);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(tokenOf(n), 0, 0, margin - 6);
    context.restore();
  }
}

const rowOptions = Array.from({ length: T }, (_, position) => tokenOption(position));
const markKey = choices(byId("row"), rowOptions, (key) => choose({ key }));

function heaviest(head, query) {
  return weightsOf(head, query).reduce((best, w, key, all) => (w > all[best] || Number.isNaN(all[best]) ? key : best), 0);
}
const rowCells = (w, key) => [`${key + 1}`, [tokenOf(key), "token"], weightShown(w), scoreShown(w, chosen.head, chosen.query), pushShown(w, chosen.head, key)];
const rowHeads = () => [words.number, words.token, words.weight, words.score, words.push];

/** In words: the chosen cell, and its row. */
function showReading() {
  const { head, query, key } = chosen;
  const row = weightsOf(head, query);
  const w = key <= query ? row[key] : 0;
  byId("head-title").textContent = `${words.oneHead}: ${headName(head)}`;
  byId("head-figures").textContent = said(words.headSays, figuresOf(head));
  matrix.setAttribute("aria-label", `${words.matrix}: ${headName(head)}`);
  const looks = { query: named(query), key: named(key) };
  byId("reading").textContent = key > query ? said(words.readsMasked, looks)
    : Number.isNaN(w) ? said(words.readsLeftOut, looks)
    : said(words.reads, { ...looks, weight: weightShown(w), score: scoreShown(w, head, query), push: pushShown(w, head, key), norm: figure(valueNorms[head * T + key]) });

  let [sum, entropy, distance] = [0, 0, 0];
  row.forEach((a, s) => {
    if (!(a > 0)) return;
    sum += a;
    entropy -= a * Math.log2(a);
    distance += a * (query - s);
  });
  const first = Number.isNaN(row[0]) ? words.leftOut : percent(row[0]);
  byId("row-says").textContent = said(words.rowSays, { query: named(query), entropy: figure(entropy, 2), distance: figure(distance, 1), first, sink: tokenOf(0), sum: figure(sum) })
    + (K && query + 1 > K ? ` ${said(words.rowKept, { kept: K, mass: percent(Math.max(0, 1 - sum)) })}` : "");
}
/** In tables and colours: the chosen row. */
function showRow() {
  const { head, query } = chosen;
  const row = weightsOf(head, query);
  const present = [...row.keys()].filter((s) => !Number.isNaN(row[s]));
  const most = present.sort((a, b) => row[b] - row[a]).slice(0, 8);
  fillTable(byId("largest"), said(words.largest, { query: named(query) }), rowHeads(), most.map((s) => rowCells(row[s], s)));
  if (byId("row-details").open) fillRowTable(row);

  byId("row-title").textContent = said(words.rowTitle, { query: named(query), where: headName(head) });
  rowOptions.forEach((option, s) => {
    const masked = s > query;
    const shown = masked ? "–" : weightShown(row[s]);
    option.classList.toggle("empty", masked);
    option.classList.toggle("key", s === query);
    option.style.setProperty("--share", masked || Number.isNaN(row[s]) ? "0%" : `${60 * Math.sqrt(row[s])}%`);
    option.show(masked ? words.masked : words.weight, shown);
  });
}
function fillRowTable(row = weightsOf(chosen.head, chosen.query)) {
  fillTable(byId("row-table"), said(words.rowTable, { query: named(chosen.query) }), rowHeads(), Array.from(row, rowCells));
}
byId("row-details").addEventListener("toggle", () => byId("row-details").open && fillRowTable());

function cellAt(event) {
  const box = matrix.getBoundingClientRect();
  const along = (x, from) => Math.max(0, Math.min(T - 1, Math.floor(((x - from) / frame.size) * T)));
  return { query: along(event.clientY - box.top, frame.top), key: along(event.clientX - box.left, frame.left) };
}
matrix.addEventListener("pointermove", (event) => chosen.pinned || choose(cellAt(event)));
matrix.addEventListener("pointerdown", (event) => {
  const isTouch = event.pointerType !== "mouse";
  choose({ ...cellAt(event), pinned: !isTouch && !chosen.pinned });
});
matrix.addEventListener("keydown", (event) => {
  const { query, key } = chosen;
  const moves = {
    ArrowUp: { query: query - 1 }, ArrowDown: { query: query + 1 }, ArrowLeft: { key: key - 1 }, ArrowRight: { key: key + 1 },
    PageUp: { query: query - 10 }, PageDown: { query: query + 10 }, Home: { key: 0 }, End: { key: query }, Escape: { pinned: false },
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  choose({ pinned: event.key !== "Escape", ...moves[event.key] });
});

// ---- what it expects next, after each layer -------------------------------------------------------------------------

function showLens() {
  const { query } = chosen;
  const next = query + 1 < T ? page.text[query + 1] : -1;
  byId("lens-title").textContent = said(words.lensTitle, { query: named(query) });
  byId("lens-says").textContent = next < 0 ? words.lensEnd
    : said(words.lensNext, { next: page.vocabulary[next], loss: figure(page.loss[query + 1], 2), chance: percent(Math.exp(-page.loss[query + 1])) });
  const stage = (layer) => (layer ? said(layer === L ? words.lensLast : words.lensAfter, { layer }) : words.lensFirst);
  const rows = Array.from({ length: L + 1 }, (_, layer) => {
    const at = (layer * T + query) * nLikeliest;
    const best = Array.from({ length: nLikeliest }, (_, n) => {
      const token = likeliest[at + n];
      return [`${page.vocabulary[token]} ${percent(probability[at + n])}${token === next ? " ✓" : ""}`, "token"];
    });
    return [stage(layer), figure(divergence[layer * T + query], 2), ...best];
  });
  const places = Array.from({ length: nLikeliest }, (_, n) => `${n + 1}`);
  fillTable(byId("lens"), words.lensCaption, [words.stage, words.divergence, ...places], rows);
}

// ---- choosing and drawing -------------------------------------------------------------------------------------------

let [waiting, later] = [false, 0];
let [read, drawn] = [{}, {}]; // what was last said in words; what all of the page shows

/** Says and marks the choice in the next frame, and draws the rest when the choice has rested for a moment. */
function choose(change) {
  Object.assign(chosen, change);
  for (const name of ["query", "key"]) chosen[name] = Math.max(0, Math.min(T - 1, chosen[name]));
  if (!waiting) requestAnimationFrame(answer);
  waiting = true;
}
const differs = (from, ...names) => names.some((name) => chosen[name] !== from[name]);
function answer() {
  waiting = false;
  if (!differs(read, "head", "query", "key")) return;
  showReading();
  markCell();
  read = { ...chosen };
  clearTimeout(later);
  later = setTimeout(drawRest, 80);
}
function drawRest() {
  if (differs(drawn, "head")) {
    markHead(chosen.head);
    drawMatrix();
  }
  if (differs(drawn, "head", "query")) showRow();
  if (differs(drawn, "query")) showLens();
  if (differs(drawn, "key")) markKey(chosen.key);
  if (differs(drawn, "query")) markQuery(chosen.query);
  drawn = { ...chosen };
}
function repaint(given) {
  readColours(given);
  headOptions.forEach((option, head) => picture(option.firstChild, head, Math.min(T, 64)));
  drawMatrix();
  markCell();
}

readColours();
showStrip("loss");
sortHeads();
byId("left-out-legend").hidden = !K;
chosen.key = heaviest(chosen.head, chosen.query);
answer();
drawRest();
repaint();
for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", () => repaint());
addEventListener("beforeprint", () => repaint(ON_PAPER));
addEventListener("afterprint", () => repaint());
addEventListener("resize", () => {
  sortHeads();
  drawMatrix();
  markCell();
});
document.documentElement.dataset.ready = "true";
