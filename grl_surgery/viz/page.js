"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const search = byId("search"), table = byId("rows");

  // ------------------------------------------------------------------------------------ the graph

  const boxes = data.boxes || [], lines = data.lines || [];
  const drawn = (box) => byId("b" + box.i);  // null until the block around it has been open
  const inside = new Map([[-1, { boxes: [], lines: [] }]]);
  boxes.forEach((box, i) => { box.i = i; if ("title" in box) inside.set(i, { boxes: [], lines: [] }); });
  boxes.forEach((box) => inside.get(box.in).boxes.push(box));
  lines.forEach((line, i) => { line.i = i; inside.get(line.in).lines.push(line); });
  const { gap, pad, header } = data.geometry || {};
  const isBlock = (box) => inside.has(box.i);
  const round = (number) => Math.round(number * 10) / 10;

  // How far each column moves to the right, so that boxes that have been opened find room. Everything in one
  // column moves alike: what was straight stays straight, what did not overlap still does not.
  function shifts(part) {
    const opened = part.boxes.filter((box) => box.width > box.w);
    const columns = [...new Set([
      ...part.boxes.map((box) => box.x), ...part.lines.flatMap((line) => line.bends.map(([x]) => x)),
    ])].sort((a, b) => a - b);
    const moved = new Map();
    let last = 0;
    columns.forEach((x) => {
      for (const box of opened) {
        const more = (box.width - box.w) / 2;
        if (box.x === x) {
          const left = columns.filter((other) => other <= x - box.w / 2).pop();
          last = Math.max(last, left === undefined ? box.width / 2 - x : moved.get(left) + more);
        } else if (box.x + box.w / 2 <= x) {
          last = Math.max(last, moved.get(box.x) + more);
        }
      }
      moved.set(x, last);
    });
    return moved;
  }

  // Places everything inside a block (or, for -1, everything), and returns how much room that takes.
  function place(owner) {
    const part = inside.get(owner);
    const heights = [];
    for (const box of part.boxes) {
      [box.width, box.height] = [box.w, box.h];
      if (box.open) {
        const [width, height] = place(box.i);
        [box.width, box.height] = [Math.max(width + 2 * pad, box.title), height + header + pad];
        box.inner = width;
      }
      heights[box.row] = Math.max(heights[box.row] || 0, box.height);
    }
    const moved = shifts(part);
    const bounds = [];
    let top = 0;
    for (let row = 0; row < heights.length; row++) {
      bounds.push([top, top + (heights[row] || 0)]);
      top = bounds[row][1] + gap;
    }
    const at = (x) => x + moved.get(x);
    let left = Infinity, right = -Infinity;
    for (const box of part.boxes) {
      left = Math.min(left, at(box.x) - box.width / 2);
      right = Math.max(right, at(box.x) + box.width / 2);
    }
    for (const line of part.lines) for (const [x] of line.bends) {
      left = Math.min(left, at(x) - 10);
      right = Math.max(right, at(x) + 10);
    }
    const entry = part.boxes.find((box) => box.kind === "entry");
    if (entry && Math.abs(left + right - 2 * at(entry.x)) <= 48) {
      const middle = at(entry.x);
      [left, right] = [Math.min(left, 2 * middle - right), Math.max(right, 2 * middle - left)];
    }
    for (const box of part.boxes) {
      box.cx = at(box.x) - left;
      box.cy = (bounds[box.row][0] + bounds[box.row][1]) / 2;
      draw(box);
    }
    for (const line of part.lines) drawLine(line, bounds, (x) => at(x) - left);
    return [right - left, bounds.length ? bounds[bounds.length - 1][1] : 0];
  }

  function draw(box) {
    const element = drawn(box);
    element.setAttribute("transform", `translate(${round(box.cx)} ${round(box.cy)})`);
    if (!isBlock(box)) return;
    element.classList.toggle("open", !!box.open);
    element.setAttribute("aria-expanded", !!box.open);
    if (!box.open) return;
    const opened = element.querySelector(":scope > .opened");
    const frame = opened.querySelector(":scope > .frame"), title = opened.querySelector(":scope > .title");
    const [x, y] = [-box.width / 2, -box.height / 2];
    for (const [key, value] of Object.entries({ x, y, width: box.width, height: box.height })) {
      frame.setAttribute(key, round(value));
    }
    title.setAttribute("x", round(x + pad));
    title.setAttribute("y", round(y + 18));
    opened.querySelector(":scope > .inside").setAttribute(
      "transform", `translate(${round(-box.inner / 2)} ${round(y + header)})`);
  }

  function drawLine(line, bounds, at) {
    const from = boxes[line.from], to = boxes[line.to];
    let [x, y] = [from.cx, bounds[from.row][1]];
    const top = to.cy - to.height / 2;
    let way = `M${round(x)},${round(from.cy + from.height / 2)}V${round(y)}`;
    const stops = line.bends.map(([bend, row]) => [at(bend), ...bounds[row]]);
    for (const [end, start, stop] of [...stops, [to.cx, bounds[to.row][0], top]]) {
      const middle = round((y + start) / 2);
      way += `C${round(x)},${middle} ${round(end)},${middle} ${round(end)},${round(start)}V${round(stop)}`;
      [x, y] = [end, stop];
    }
    const element = byId("l" + line.i);
    element.querySelector(".way").setAttribute("d", way);
    const tip = element.querySelector(".tip");
    if (tip) tip.setAttribute("d", `M${round(to.cx - 3.5)},${round(top - 6)}h7l-3.5,6z`);
  }

  const picture = byId("picture"), canvas = byId("canvas");
  let zoom = 1, room = picture ? [picture.viewBox.baseVal.width, picture.viewBox.baseVal.height] : [0, 0];

  function redraw() {
    const [width, height] = place(-1);
    room = [width + 2 * pad, height + 2 * pad];
    picture.setAttribute("viewBox", `0 0 ${round(room[0])} ${round(room[1])}`);
    scale(zoom);
  }

  function scale(factor) {
    zoom = Math.min(3, Math.max(0.1, factor));
    picture.setAttribute("width", round(room[0] * zoom));
    picture.setAttribute("height", round(room[1] * zoom));
  }

  const fit = () => scale(Math.min(1, (canvas.clientWidth - 2) / room[0]));

  // ----------------------------------------------------------------------- choosing and opening boxes

  const details = byId("details");
  let chosen = null, reached = null, view = 0, words = [], hitsInside = new Set();

  const above = (box) => (box.in < 0 ? [] : [boxes[box.in], ...above(boxes[box.in])]);
  const visible = () => boxes.filter((box) => box.name !== undefined && above(box).every((it) => it.open));

  function open(box) {
    box.open = true;
    const part = drawn(box).querySelector(":scope > .opened > .inside");
    if (part.hasChildNodes()) return;
    part.innerHTML = data.insides[box.i];  // made and escaped where the page was; most are never looked at
    const { boxes, lines } = inside.get(box.i);
    boxes.forEach(paint);
    boxes.forEach(mark);
    lines.forEach(paintLine);
  }

  function toggle(box) {
    if (!isBlock(box)) return;
    const before = drawn(box).getBoundingClientRect();
    if (box.open) box.open = false; else open(box);
    redraw();
    const after = drawn(box).getBoundingClientRect();  // what was clicked stays under the pointer
    canvas.scrollTop += after.top - before.top;
    canvas.scrollLeft += after.left + after.width / 2 - before.left - before.width / 2;
  }

  function choose(box, focus = true) {
    if (chosen) drawn(chosen).classList.remove("chosen");
    chosen = box;
    drawn(box).classList.add("chosen");
    reach(box);
    if (focus) drawn(box).focus({ preventScroll: true });
    describe(box);
  }

  // The one box that the tab key leads to.
  function reach(box) {
    if (reached) drawn(reached).tabIndex = -1;
    reached = box;
    drawn(box).tabIndex = 0;
  }

  function reveal(box, focus = true) {
    const closed = above(box).filter((block) => !block.open).reverse();
    closed.forEach(open);
    if (closed.length) redraw();
    choose(box, focus);
    scrollTo(box);
  }

  function scrollTo(box) {
    const element = drawn(box), part = element.querySelector(":scope > .opened > .title") || element;
    const shape = (box.open ? part : element).getBoundingClientRect(), frame = canvas.getBoundingClientRect();
    if (shape.top < frame.top || shape.bottom > frame.bottom) {
      canvas.scrollTop += (shape.top + shape.bottom - frame.top - frame.bottom) / 2;
    }
    if (shape.left < frame.left || shape.right > frame.right) {
      canvas.scrollLeft += (shape.left + shape.right - frame.left - frame.right) / 2;
    }
    canvas.scrollIntoView({ block: "nearest" });
  }

  function write(title, facts, kind) {
    const list = document.createElement("dl");
    for (const [term, value] of facts) {
      if (!value) continue;
      list.append(Object.assign(document.createElement("dt"), { textContent: term }));
      list.append(Object.assign(document.createElement("dd"), { textContent: value }));
    }
    const heading = Object.assign(document.createElement("h3"), { textContent: title });
    if (kind) {
      const sign = Object.assign(document.createElement("span"), { className: "sign" });
      sign.textContent = data.glyphs[kind];
      sign.dataset.kind = kind;
      heading.prepend(sign);
    }
    details.replaceChildren(heading, list);
    details.hidden = false;
  }

  // What to type for this point, and a button that copies it.
  function writeCall(name) {
    const line = Object.assign(document.createElement("p"), { className: "call" });
    const quoted = JSON.stringify(name);
    const code = Object.assign(document.createElement("code"), { textContent: `after=${quoted}` });
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Copy" });
    button.setAttribute("aria-label", `Copy after=${quoted}`);
    button.addEventListener("click", () => copy(code, button));
    line.append(code, button);
    details.append(line);
  }

  async function copy(code, button) {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {  // no clipboard for a page from a disk in this browser: the selection serves instead
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
  }

  function leave() {
    if (chosen) describe(chosen); else details.hidden = true;
  }

  const isPoint = (box) => !["output", "reversal", "head"].includes(box.kind);

  function describe(box) {
    const [kind, predicted, measured, factor] = box.marks[view] || [];
    const facts = [...Object.entries(box.about)];
    if (box.marks.length) {
      const none = predicted ? "nothing to measure here" : "";
      facts.push(["predicted", predicted], ["measured", measured || none], ["gradient ×", factor]);
    }
    write(box.name, facts, kind);
    if (isPoint(box)) writeCall(box.name);
  }

  function describeLine(line) {
    const kind = line.kinds[view];
    write(line.name, [["gradient", kind]], kind);
  }

  function setKind(element, kind) {
    if (kind) element.dataset.kind = kind; else delete element.dataset.kind;
  }

  function paint(box) {
    const element = drawn(box);
    if (!element || !box.marks || !box.marks.length) return;
    const [kind, , measured] = box.marks[view];
    setKind(element, kind);
    if (measured) element.dataset.measured = ""; else delete element.dataset.measured;
    const sign = element.querySelector(":scope > .mark text, :scope > .closed > .mark text");
    if (sign) sign.textContent = data.glyphs[kind] || "";
  }

  function paintLine(line) {
    const element = byId("l" + line.i);
    if (element) setKind(element, line.kinds[view]);
  }

  function show(number) {
    view = number;
    boxes.forEach(paint);
    lines.forEach(paintLine);
    if (chosen) describe(chosen);
  }

  const boxOf = (target) => {
    const element = target.closest && target.closest(".box[role]");
    return element ? boxes[Number(element.id.slice(1))] : null;
  };

  if (picture) {
    data.open.forEach((i) => open(boxes[i]));
    if (data.open.length) redraw();
    fit();
    const first = boxes.find((box) => box.name !== undefined);
    if (first) reach(first);

    // On the canvas: an SVG element that listens to the focus takes it.
    canvas.addEventListener("click", (event) => {
      const box = boxOf(event.target);
      if (!box) {
        if (chosen) drawn(chosen).classList.remove("chosen");
        chosen = null;
        leave();
        return;
      }
      choose(box);
      if (!box.open || event.target.closest(".title")) toggle(box);
    });
    canvas.addEventListener("pointerover", (event) => {
      const line = event.target.closest(".line"), box = boxOf(event.target);
      if (line) describeLine(lines[Number(line.id.slice(1))]); else if (box) describe(box);
    });
    canvas.addEventListener("pointerleave", (event) => {
      if (!details.contains(event.relatedTarget)) leave();
    });
    details.addEventListener("pointerleave", leave);
    canvas.addEventListener("focusin", (event) => {
      const box = boxOf(event.target);
      if (box && box !== chosen) choose(box, false);
    });
    canvas.addEventListener("keydown", (event) => {
      const box = boxOf(event.target);
      if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
      const shown = visible(), here = shown.indexOf(box);
      const go = (to) => { if (to) { choose(to); scrollTo(to); } };
      const actions = {
        Enter: () => toggle(box),
        " ": () => toggle(box),
        ArrowDown: () => go(shown[here + 1]),
        ArrowUp: () => go(shown[here - 1]),
        ArrowRight: () => (isBlock(box) && !box.open ? toggle(box) : go(shown[here + 1])),
        ArrowLeft: () => (box.open ? toggle(box) : go(boxes[box.in])),
        Home: () => go(shown[0]),
        End: () => go(shown[shown.length - 1]),
        "+": () => scale(zoom * 1.25),
        "-": () => scale(zoom / 1.25),
        "0": fit,
      };
      if (!(event.key in actions)) return;
      event.preventDefault();
      actions[event.key]();
    });
    const all = (change) => { boxes.filter(isBlock).forEach(change); redraw(); };
    byId("open-all").addEventListener("click", () => all(open));
    byId("close-all").addEventListener("click", () => all((box) => { box.open = false; }));
    byId("smaller").addEventListener("click", () => scale(zoom / 1.25));
    byId("larger").addEventListener("click", () => scale(zoom * 1.25));
    byId("fit").addEventListener("click", fit);
    const select = byId("view");
    if (select) select.addEventListener("change", () => show(Number(select.value)));
  }

  // ------------------------------------------------------------------------------------- the table

  const body = table.tBodies[0], rows = [...body.rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  let hits = [], hit = -1;

  function fits(text) {
    return words.every((word) => text.includes(word));
  }

  function isHit(box) {
    return words.length > 0 && box.name !== undefined && fits(`${box.name} ${box.about.type}`.toLowerCase());
  }

  function mark(box) {
    const element = drawn(box);
    if (element) element.classList.toggle("hit", isHit(box));
    if (element) element.classList.toggle("holds-hit", hitsInside.has(box));
  }

  function find() {
    words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => { row.hidden = !fits(texts[i]); count += !row.hidden; });
    const out = rows.length - count;
    hits = boxes.filter(isHit);
    hit = -1;
    const parts = [`${count} of ${rows.length}`, out ? `${out} left out` : ""];
    if (picture && words.length) parts.push(`${hits.length} in the picture${hits.length ? " (Enter: next)" : ""}`);
    byId("found").textContent = parts.filter(Boolean).join(", ");
    hitsInside = new Set(hits.flatMap(above));
    boxes.forEach(mark);
  }

  // Shows the next box that the search has found, also inside of blocks that were closed.
  function nextHit(step) {
    if (!hits.length) return;
    hit = (Math.max(hit, step > 0 ? -1 : 0) + step + hits.length) % hits.length;
    reveal(hits[hit], false);
  }

  function sort(heading) {
    const column = heading.cellIndex, down = heading.ariaSort === "ascending";
    const isNumber = heading.classList.contains("number");
    const value = (row) => row.cells[column].dataset.value;
    const compare = isNumber
      ? (a, b) => Number(value(a)) - Number(value(b))
      : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    const sorted = [...rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
    for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
    heading.ariaSort = down ? "descending" : "ascending";
    body.append(...sorted);
  }

  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; find(); }
    if (event.key === "Enter") { event.preventDefault(); nextHit(event.shiftKey ? -1 : 1); }
  });
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (heading) sort(heading);
  });
  body.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    reveal(boxes[Number(link.hash.slice(2))]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /input|select|textarea/i.test(event.target.tagName)) return;
    event.preventDefault();
    search.focus();
  });
})();
