// Painting part labels on pictures: one canvas for the notebook widget and for the page of `lagm label`.
//
// A mask is one byte a pixel, row by row: the number of a class, or 255 where nothing is labelled yet.
// `link` is what keeps pictures and masks; all its functions return promises:
//   state()             {names, classes: [{name, colour: "#rrggbb"}], proposals: [...], index}
//   picture(i)          {width, height, url, mask: Uint8Array}
//   save(i, mask)       {labelled: share of the picture in 0..1}, once the mask is on disk
//   propose(kind, i)    Uint8Array: a number for each pixel, a region ("clusters") or a class ("prediction")

const IGNORE = 255;
const STEPS = [0.125, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24]; // of the zoom: pixels of the screen for one of the picture
const UNDO_BYTES = 64 * 1024 * 1024;
const TOOLS = [
  ["brush", "b", "Brush"],
  ["erase", "e", "Eraser"],
  ["lasso", "l", "Lasso"],
  ["polygon", "p", "Polygon"],
  ["fill", "f", "Fill"],
  ["region", "g", "Region"],
];

// ---- geometry: pure functions of numbers, the same everywhere

/** Calls `at(x, y)` for each pixel whose centre is at most size / 2 from the line between two points. */
export function strokePixels(x0, y0, x1, y1, size, width, height, at) {
  if (size <= 1) return thinLine(Math.floor(x0), Math.floor(y0), Math.floor(x1), Math.floor(y1), width, height, at);
  const r = size / 2,
    dx = x1 - x0,
    dy = y1 - y0,
    length2 = dx * dx + dy * dy;
  const left = Math.max(0, Math.floor(Math.min(x0, x1) - r)),
    right = Math.min(width - 1, Math.ceil(Math.max(x0, x1) + r));
  const top = Math.max(0, Math.floor(Math.min(y0, y1) - r)),
    bottom = Math.min(height - 1, Math.ceil(Math.max(y0, y1) + r));
  for (let y = top; y <= bottom; y++)
    for (let x = left; x <= right; x++) {
      const px = x + 0.5 - x0,
        py = y + 0.5 - y0;
      const t = length2 ? Math.max(0, Math.min(1, (px * dx + py * dy) / length2)) : 0;
      const ex = px - t * dx,
        ey = py - t * dy;
      if (ex * ex + ey * ey <= r * r) at(x, y);
    }
}

function thinLine(x0, y0, x1, y1, width, height, at) {
  const steps = Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1);
  for (let i = 0; i <= steps; i++) {
    const x = Math.round(x0 + ((x1 - x0) * i) / steps),
      y = Math.round(y0 + ((y1 - y0) * i) / steps);
    if (x >= 0 && y >= 0 && x < width && y < height) at(x, y);
  }
}

/** Calls `at(x, y)` for each pixel whose centre is inside a closed polygon (even-odd rule). */
export function polygonPixels(points, width, height, at) {
  const ys = points.map(p => p[1]);
  const top = Math.max(0, Math.floor(Math.min(...ys))),
    bottom = Math.min(height - 1, Math.ceil(Math.max(...ys)));
  for (let y = top; y <= bottom; y++) {
    const crossings = [],
      level = y + 0.5;
    for (let i = 0, j = points.length - 1; i < points.length; j = i++) {
      const [xa, ya] = points[j],
        [xb, yb] = points[i];
      if (ya > level !== yb > level) crossings.push(xa + ((level - ya) / (yb - ya)) * (xb - xa));
    }
    crossings.sort((a, b) => a - b);
    for (let k = 0; k + 1 < crossings.length; k += 2) {
      const first = Math.max(0, Math.ceil(crossings[k] - 0.5)),
        last = Math.min(width - 1, Math.ceil(crossings[k + 1] - 0.5) - 1);
      for (let x = first; x <= last; x++) at(x, y);
    }
  }
}

/** Calls `at(x, y)` for the pixels of equal value that hang together with one (up, down, left, right). */
export function connectedPixels(values, x0, y0, width, height, at) {
  const wanted = values[y0 * width + x0],
    seen = new Uint8Array(width * height),
    waiting = [y0 * width + x0];
  seen[waiting[0]] = 1;
  while (waiting.length) {
    const i = waiting.pop(),
      x = i % width,
      y = (i - x) / width;
    at(x, y);
    for (const [j, inside] of [
      [i - 1, x > 0],
      [i + 1, x < width - 1],
      [i - width, y > 0],
      [i + width, y < height - 1],
    ])
      if (inside && !seen[j] && values[j] === wanted) {
        seen[j] = 1;
        waiting.push(j);
      }
  }
}

// ---- one picture's mask, and what was done to it

class Mask {
  constructor(width, height, values) {
    this.width = width;
    this.height = height;
    this.values = values;
    this.done = [];
    this.undone = [];
    this.bytes = 0;
    this.begin();
  }
  begin() {
    this.touched = new Map();
  }
  set(x, y, value) {
    const i = y * this.width + x;
    if (this.values[i] === value) return;
    if (!this.touched.has(i)) this.touched.set(i, this.values[i]);
    this.values[i] = value;
  }
  /** Ends one action; true if it changed anything. */
  end() {
    const at = [],
      before = [],
      after = [];
    for (const [i, was] of this.touched)
      if (this.values[i] !== was) {
        at.push(i);
        before.push(was);
        after.push(this.values[i]);
      }
    this.begin();
    if (!at.length) return false;
    const step = {at: Uint32Array.from(at), before: Uint8Array.from(before), after: Uint8Array.from(after)};
    this.done.push(step);
    this.undone = [];
    this.bytes += 6 * at.length;
    while (this.bytes > UNDO_BYTES && this.done.length > 1) this.bytes -= 6 * this.done.shift().at.length;
    return true;
  }
  undo() {
    return this.#move(this.done, this.undone, "before");
  }
  redo() {
    return this.#move(this.undone, this.done, "after");
  }
  #move(from, to, which) {
    const step = from.pop();
    if (!step) return false;
    step.at.forEach((i, k) => {
      this.values[i] = step[which][k];
    });
    to.push(step);
    return true;
  }
}

// ---- the page

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    name in node && name !== "list" ? (node[name] = value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const rgb = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));

export class Painter {
  constructor(root, link) {
    this.root = root;
    this.link = link;
    this.tool = "brush";
    this.size = 7;
    this.opacity = 0.55;
    this.zoom = 0;
    this.label = 1;
    this.points = [];
    this.cursor = null;
    this.pressed = null;
    this.masks = new Map();
    this.regions = null;
    this.saving = null;
    this.waiting = null;
    this.turn = 0;
    root.classList.add("lagm-painter");
    root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys rest while the painter has the focus
  }

  /** Builds the page and opens the first picture; `focus`: keys work at once. */
  async start(focus = false) {
    try {
      this.state = await this.link.state();
    } catch (error) {
      this.root.textContent = `The painter cannot start: ${error.message}`;
      return;
    }
    this.label = Math.min(1, this.state.classes.length - 1);
    this.colours = this.state.classes.map(c => rgb(c.colour));
    this.build();
    await this.show(this.state.index || 0);
    if (focus) this.stage.focus();
  }

  build() {
    const button = (text, title, does, extra = {}) =>
      element("button", {type: "button", title, onclick: does, ...extra}, text);
    this.tools = Object.fromEntries(
      TOOLS.filter(([name]) => name !== "region" || this.state.proposals.includes("clusters")).map(
        ([name, key, text]) => [name, button(text, `${text} (${key})`, () => this.choose(name))],
      ),
    );
    this.undoButton = button("Undo", "Undo (z)", () => this.step("undo"));
    this.redoButton = button("Redo", "Redo (y)", () => this.step("redo"));
    this.sizeInput = element("input", {
      type: "range",
      min: 1,
      max: 60,
      value: this.size,
      title: "Brush size ([ and ])",
      ariaLabel: "brush size",
      oninput: e => this.resize(+e.target.value),
    });
    this.opacityInput = element("input", {
      type: "range",
      min: 0,
      max: 100,
      value: 100 * this.opacity,
      title: "Opacity of the labels (o shows and hides them)",
      ariaLabel: "opacity of the labels",
      oninput: e => {
        this.opacity = e.target.value / 100;
        this.draw();
      },
    });
    this.previous = button("◀", "Previous picture (Page up)", () => this.show(this.index - 1), {
      ariaLabel: "previous picture",
    });
    this.next = button("▶", "Next picture (Page down)", () => this.show(this.index + 1), {ariaLabel: "next picture"});
    this.where = element(
      "select",
      {ariaLabel: "picture", onchange: e => this.show(+e.target.value)},
      ...this.state.names.map((name, i) => element("option", {value: i}, `${i + 1}. ${name}`)),
    );
    const rest = button(
      "Rest is " + this.state.classes[0].name,
      `Give what is not labelled yet to ${this.state.classes[0].name} (r)`,
      () => this.rest(),
    );
    const more = this.state.proposals.includes("prediction")
      ? [
          button("Start from prediction", "Fill what is not labelled yet with the segmenter's prediction (s)", () =>
            this.predict(),
          ),
        ]
      : [];
    const zooms = [
      button("−", "Smaller (-)", () => this.magnify(-1), {ariaLabel: "smaller"}),
      button("+", "Larger (+)", () => this.magnify(1), {ariaLabel: "larger"}),
    ];
    this.classes = this.state.classes.map((c, i) => {
      const swatch = element("span", {className: "swatch"});
      swatch.style.background = c.colour;
      const node = button("", i < 10 ? `${c.name} (${i})` : c.name, () => this.pick(i));
      node.replaceChildren(swatch, i < 10 ? `${i} ${c.name}` : c.name);
      return node;
    });
    this.image = element("img", {alt: "", draggable: false});
    this.canvas = element("canvas");
    this.overlay = svg("svg", {"aria-hidden": "true"});
    this.stage = element(
      "div",
      {
        className: "stage",
        tabIndex: 0,
        role: "application",
        ariaLabel: "the picture; arrow keys move the cross, space paints, enter closes a polygon",
      },
      this.image,
      this.canvas,
      this.overlay,
    );
    this.frame = element("div", {className: "frame"}, this.stage);
    this.status = element("div", {className: "status", role: "status"});
    this.root.replaceChildren(
      element(
        "div",
        {className: "bar"},
        this.previous,
        this.where,
        this.next,
        ...zooms,
        this.undoButton,
        this.redoButton,
        rest,
        ...more,
      ),
      element(
        "div",
        {className: "bar"},
        ...Object.values(this.tools),
        element("label", {}, "size ", this.sizeInput),
        element("label", {}, "labels ", this.opacityInput),
      ),
      element("div", {className: "bar classes", role: "group", ariaLabel: "classes"}, ...this.classes),
      this.frame,
      this.status,
    );
    this.stage.addEventListener("pointerdown", e => this.down(e));
    this.stage.addEventListener("pointermove", e => this.move(e));
    this.stage.addEventListener("pointerup", () => this.up());
    this.stage.addEventListener("pointercancel", () => this.up());
    this.stage.addEventListener("pointerleave", () => {
      if (!this.pressed) {
        this.cursor = null;
        this.outline();
      }
    });
    this.stage.addEventListener("dblclick", e => {
      e.preventDefault();
      this.close();
    });
    this.frame.addEventListener(
      "wheel",
      e => {
        if (e.ctrlKey || e.metaKey) {
          e.preventDefault();
          this.magnify(e.deltaY < 0 ? 1 : -1);
        }
      },
      {passive: false},
    );
    this.root.addEventListener("keydown", e => this.key(e));
    this.choose(this.tool);
    this.pick(this.label);
  }

  say(text, wrong = false) {
    this.status.textContent = text;
    this.status.classList.toggle("wrong", wrong);
  }

  // -- pictures

  async show(index) {
    if (index < 0 || index >= this.state.names.length) return;
    this.up(); // a stroke that is not over yet belongs to the picture that is left
    const turn = ++this.turn;
    this.points = [];
    this.pressed = null;
    this.regions = null;
    this.say(`opening ${this.state.names[index]} ...`);
    let picture;
    try {
      picture = await this.link.picture(index);
    } catch (error) {
      if (turn === this.turn) this.say(error.message, true);
      return;
    }
    if (turn !== this.turn) return; // another picture was asked for meanwhile
    const kept = this.masks.get(index);
    this.index = index;
    this.where.value = index;
    this.previous.disabled = index === 0;
    this.next.disabled = index === this.state.names.length - 1;
    this.mask =
      kept && kept.width === picture.width && kept.height === picture.height
        ? kept
        : new Mask(picture.width, picture.height, new Uint8Array(picture.mask));
    this.masks.set(index, this.mask);
    this.image.src = picture.url;
    this.canvas.width = picture.width;
    this.canvas.height = picture.height;
    this.overlay.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    this.zoom ||= STEPS.findLast(step => step * Math.max(picture.width, picture.height) <= 640) ?? STEPS[0];
    this.scale();
    this.draw();
    this.outline();
    this.tell();
    if (this.tool === "region") this.propose();
  }

  scale() {
    for (const node of [this.stage, this.image, this.canvas, this.overlay]) {
      node.style.width = `${this.mask.width * this.zoom}px`;
      node.style.height = `${this.mask.height * this.zoom}px`;
    }
  }

  magnify(direction) {
    const now = STEPS.findIndex(step => step >= this.zoom);
    this.zoom = STEPS[Math.max(0, Math.min(STEPS.length - 1, now + direction))];
    this.scale();
    this.outline();
  }

  draw() {
    if (!this.mask) return;
    const {width, height, values} = this.mask,
      context = this.canvas.getContext("2d"),
      pixels = context.createImageData(width, height);
    const alpha = Math.round(255 * this.opacity);
    for (let i = 0; i < values.length; i++) {
      const colour = this.colours[values[i]];
      if (!colour) continue;
      pixels.data[4 * i] = colour[0];
      pixels.data[4 * i + 1] = colour[1];
      pixels.data[4 * i + 2] = colour[2];
      pixels.data[4 * i + 3] = alpha;
    }
    context.putImageData(pixels, 0, 0);
  }

  /** The lines over the picture: the polygon or lasso that is being drawn, the brush, the cross. */
  outline() {
    this.overlay.replaceChildren();
    if (!this.mask) return;
    const width = 1.5 / this.zoom,
      both = (tag, attributes) =>
        [
          ["black", 2 * width],
          ["white", width],
        ].forEach(([stroke, w]) =>
          this.overlay.append(svg(tag, {...attributes, stroke, "stroke-width": w, fill: "none"})),
        );
    if (this.points.length) both("polyline", {points: this.points.map(p => p.join(",")).join(" ")});
    if (this.points.length && this.tool === "polygon")
      both("circle", {cx: this.points[0][0], cy: this.points[0][1], r: 4 * width});
    if (!this.cursor) return;
    const [x, y] = this.cursor;
    if (this.tool === "brush" || this.tool === "erase") both("circle", {cx: x, cy: y, r: Math.max(0.5, this.size / 2)});
    if (this.cross) {
      both("line", {x1: x - 6 * width, y1: y, x2: x + 6 * width, y2: y});
      both("line", {x1: x, y1: y - 6 * width, x2: x, y2: y + 6 * width});
    }
  }

  // -- choices

  choose(tool) {
    if (!this.tools[tool]) return;
    this.tool = tool;
    this.points = [];
    for (const [name, node] of Object.entries(this.tools)) node.ariaPressed = String(name === tool);
    this.outline();
    if (tool === "region") this.propose();
  }

  pick(label) {
    if (label >= this.classes.length) return;
    this.label = label;
    this.classes.forEach((node, i) => {
      node.ariaPressed = String(i === label);
    });
    if (this.tool === "erase") this.choose("brush");
  }

  resize(size) {
    this.size = Math.max(1, Math.min(60, size));
    this.sizeInput.value = this.size;
    this.outline();
  }

  // -- painting

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.mask.width,
      ((event.clientY - box.top) / box.height) * this.mask.height,
    ];
  }

  down(event) {
    if (!this.mask || event.button !== 0) return;
    event.preventDefault();
    this.stage.focus({preventScroll: true});
    this.stage.setPointerCapture(event.pointerId);
    this.cross = false;
    this.cursor = this.place(event);
    this.press();
    if (this.tool === "brush" || this.tool === "erase" || this.tool === "lasso") this.pressed = this.cursor;
  }

  move(event) {
    if (!this.mask) return;
    this.cross = false;
    for (const e of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
      this.cursor = this.place(e);
      if (!this.pressed) continue;
      if (this.tool === "lasso") this.points.push(this.cursor);
      else this.dab(this.pressed, this.cursor);
      this.pressed = this.cursor;
    }
    if (this.pressed && this.tool !== "lasso") this.draw();
    this.outline();
  }

  up() {
    if (!this.pressed) return;
    this.pressed = null;
    if (this.tool === "lasso") this.close();
    else this.commit();
  }

  /** What a press does where the cursor is: a dab, a corner, a filled region. */
  press() {
    const [x, y] = this.cursor,
      px = Math.floor(x),
      py = Math.floor(y),
      {width, height} = this.mask;
    if (px < 0 || py < 0 || px >= width || py >= height) return;
    if (this.tool === "brush" || this.tool === "erase") {
      this.dab(this.cursor, this.cursor);
      this.draw();
    } else if (this.tool === "lasso") this.points = [this.cursor];
    else if (this.tool === "polygon") this.corner();
    else if (this.tool === "fill") {
      const found = [];
      connectedPixels(this.mask.values, px, py, width, height, (a, b) => found.push([a, b]));
      this.put(found);
    } else if (this.tool === "region") this.region(px, py);
    this.outline();
  }

  dab(from, to) {
    const value = this.tool === "erase" ? IGNORE : this.label;
    strokePixels(...from, ...to, this.size, this.mask.width, this.mask.height, (x, y) => this.mask.set(x, y, value));
  }

  corner() {
    const first = this.points[0];
    if (this.points.length > 2 && Math.hypot(first[0] - this.cursor[0], first[1] - this.cursor[1]) * this.zoom < 8)
      return this.close();
    this.points.push(this.cursor);
  }

  close() {
    const points = this.points;
    this.points = [];
    if (points.length > 2)
      polygonPixels(points, this.mask.width, this.mask.height, (x, y) => this.mask.set(x, y, this.label));
    this.commit();
  }

  region(px, py) {
    if (!this.regions) return this.say("the regions are not there yet", true);
    const wanted = this.regions[py * this.mask.width + px],
      found = [];
    this.regions.forEach((value, i) => {
      if (value === wanted) found.push([i % this.mask.width, Math.floor(i / this.mask.width)]);
    });
    this.put(found);
  }

  put(pixels) {
    for (const [x, y] of pixels) this.mask.set(x, y, this.label);
    this.commit();
  }

  rest() {
    this.mask.values.forEach((value, i) => {
      if (value === IGNORE) this.mask.set(i % this.mask.width, Math.floor(i / this.mask.width), 0);
    });
    this.commit();
  }

  async propose() {
    const index = this.index;
    if (index === undefined) return;
    this.say("looking for regions ...");
    try {
      const found = await this.link.propose("clusters", index);
      if (index === this.index) {
        this.regions = found;
        this.say("click a region to name it");
      }
    } catch (error) {
      this.say(error.message, true);
    }
  }

  async predict() {
    const index = this.index,
      mask = this.mask;
    this.say("predicting ...");
    try {
      const found = await this.link.propose("prediction", index);
      found.forEach((value, i) => {
        if (mask.values[i] === IGNORE) mask.set(i % mask.width, Math.floor(i / mask.width), value);
      });
      if (index === this.index) this.commit();
      else if (mask.end()) this.save(index);
    } catch (error) {
      this.say(error.message, true);
    }
  }

  step(which) {
    if (this.mask && this.mask[which]()) {
      this.draw();
      this.save(this.index);
    }
  }

  /** One action is over: show it and save it. */
  commit() {
    const changed = this.mask.end();
    this.draw();
    this.outline();
    if (changed) this.save(this.index);
  }

  // -- saving: one at a time, the newest of those that wait

  save(index) {
    this.undoButton.disabled = !this.mask.done.length;
    this.redoButton.disabled = !this.mask.undone.length;
    this.waiting ??= new Set();
    this.waiting.add(index);
    this.root.dataset.saved = "no";
    this.saving ??= this.flush().finally(() => {
      this.saving = null;
    });
    return this.saving;
  }

  async flush() {
    while (this.waiting.size) {
      const [index] = this.waiting;
      this.waiting.delete(index);
      try {
        await this.link.save(index, this.masks.get(index).values.slice());
      } catch (error) {
        this.say(`not saved: ${error.message}`, true);
        this.waiting.add(index);
        this.root.dataset.saved = "failed";
        return;
      }
    }
    this.root.dataset.saved = "yes";
    this.tell("saved; ");
  }

  tell(before = "") {
    const left = this.mask.values.reduce((sum, value) => sum + (value === IGNORE), 0) / this.mask.values.length;
    this.undoButton.disabled = !this.mask.done.length;
    this.redoButton.disabled = !this.mask.undone.length;
    this.say(
      `${before}${this.state.names[this.index]}, ${this.mask.width} × ${this.mask.height}: ` +
        (left ? `${(100 * left).toFixed(left < 0.1 ? 1 : 0)} % not labelled yet` : "all labelled"),
    );
  }

  // -- keys

  key(event) {
    if (
      !this.mask ||
      event.altKey ||
      (event.target.matches?.("select, input") && !["PageUp", "PageDown"].includes(event.key))
    )
      return;
    const control = event.ctrlKey || event.metaKey,
      key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const far = event.shiftKey ? 10 : 1;
    const plain = {
      z: () => this.step("undo"),
      y: () => this.step("redo"),
      "[": () => this.resize(this.size - 1),
      "]": () => this.resize(this.size + 1),
      "+": () => this.magnify(1),
      "=": () => this.magnify(1),
      "-": () => this.magnify(-1),
      r: () => this.rest(),
      o: () => this.hide(),
      s: () => {
        if (this.state.proposals.includes("prediction")) this.predict();
      },
      PageUp: () => this.show(this.index - 1),
      PageDown: () => this.show(this.index + 1),
      Enter: () => this.close(),
      Escape: () => {
        this.points = [];
        this.outline();
      },
      ArrowLeft: () => this.go(-far, 0),
      ArrowRight: () => this.go(far, 0),
      ArrowUp: () => this.go(0, -far),
      ArrowDown: () => this.go(0, far),
      " ": () => this.pressKey(),
    };
    for (const [name, letter] of TOOLS) plain[letter] = () => this.choose(name);
    for (let i = 0; i < 10; i++) plain[i] = () => this.pick(i);
    const withControl = {z: () => this.step(event.shiftKey ? "redo" : "undo"), y: () => this.step("redo")};
    const onButton = event.target.matches?.("button") && (key === " " || key === "Enter");
    const does = onButton ? null : control ? withControl[key] : plain[key];
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    does();
  }

  go(dx, dy) {
    const {width, height} = this.mask,
      [x, y] = this.cursor || [Math.floor(width / 2) + 0.5, Math.floor(height / 2) + 0.5];
    this.cursor = [
      Math.max(0.5, Math.min(width - 0.5, Math.floor(x) + 0.5 + dx)),
      Math.max(0.5, Math.min(height - 0.5, Math.floor(y) + 0.5 + dy)),
    ];
    this.cross = true;
    this.outline();
  }

  pressKey() {
    if (!this.cursor) this.go(0, 0);
    if (this.tool === "lasso") {
      this.points.push(this.cursor);
      this.outline();
      return;
    }
    this.press();
    if (this.tool !== "polygon") this.commit();
  }

  hide() {
    this.opacity = this.opacity ? 0 : 0.55;
    this.opacityInput.value = 100 * this.opacity;
    this.draw();
  }
}

export const STYLE = `
.lagm-painter { font: 14px/1.4 system-ui, sans-serif; max-width: 100%; color: CanvasText; }
.lagm-painter .bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; margin-bottom: 6px; }
.lagm-painter button { padding: 3px 9px; border: 1px solid #888; border-radius: 4px; background: ButtonFace; color: ButtonText; font: inherit; cursor: pointer; }
.lagm-painter button[aria-pressed="true"] { outline: 2px solid #1a6fd6; outline-offset: -1px; font-weight: 600; }
.lagm-painter button:disabled { opacity: 0.45; cursor: default; }
.lagm-painter .swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 5px; border: 1px solid #666; border-radius: 2px; vertical-align: -1px; }
.lagm-painter .frame { overflow: auto; width: fit-content; max-width: 100%; max-height: 75vh; border: 1px solid #999; background: #777; }
.lagm-painter .stage { position: relative; touch-action: none; cursor: crosshair; user-select: none; }
.lagm-painter .stage:focus-visible { outline: 2px solid #1a6fd6; outline-offset: -2px; }
.lagm-painter .stage > * { position: absolute; left: 0; top: 0; image-rendering: pixelated; max-width: none; }
.lagm-painter .status { min-height: 1.5em; margin-top: 4px; }
.lagm-painter .status.wrong { color: #c00; font-weight: 600; }
`;

// ---- the notebook widget: requests and answers are messages of the kernel

const WAIT = 20000;

function kernelLink(model) {
  let number = 0;
  const open = new Map();
  model.on("msg:custom", (content, buffers) => {
    const waiting = open.get(content.answer);
    if (!waiting) return;
    open.delete(content.answer);
    clearTimeout(waiting.timer);
    const bytes = buffers.map(b => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength));
    content.error ? waiting.fail(new Error(content.error)) : waiting.done([content.result, bytes]);
  });
  const ask = (kind, values = {}, buffers = []) =>
    new Promise((done, fail) => {
      const id = ++number;
      const timer = setTimeout(() => {
        open.delete(id);
        fail(new Error("the kernel does not answer; restart it and run the cell again"));
      }, WAIT);
      open.set(id, {done, fail, timer});
      model.send({ask: id, kind, ...values}, undefined, buffers);
    });
  return {
    state: async () => (await ask("state"))[0],
    picture: async index => {
      const [facts, [png, mask]] = await ask("picture", {index});
      return {...facts, url: URL.createObjectURL(new Blob([png], {type: "image/png"})), mask: mask.slice()};
    },
    save: async (index, mask) => (await ask("save", {index}, [mask.buffer]))[0],
    propose: async (what, index) => (await ask("propose", {what, index}))[1][0].slice(),
  };
}

export default {
  render({model, el}) {
    const root = element("div");
    el.append(element("style", {}, STYLE), root);
    new Painter(root, kernelLink(model)).start();
  },
};

// ---- the page of `lagm label`: the same over HTTP, from this machine alone

export function pageLink(token) {
  const ask = async (path, options = {}) => {
    let answer;
    try {
      answer = await fetch(path, {...options, headers: {"X-Token": token}});
    } catch {
      throw new Error("`lagm label` does not answer; start it again, what was saved is on disk");
    }
    if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
    return answer;
  };
  return {
    state: async () => (await ask("/api/state")).json(),
    picture: async index => {
      const [png, mask] = await Promise.all([ask(`/api/picture/${index}`), ask(`/api/mask/${index}`)]);
      const [width, height] = ["X-Width", "X-Height"].map(name => +mask.headers.get(name));
      return {
        width,
        height,
        url: URL.createObjectURL(await png.blob()),
        mask: new Uint8Array(await mask.arrayBuffer()),
      };
    },
    save: async (index, mask) => (await ask(`/api/mask/${index}`, {method: "PUT", body: mask})).json(),
    propose: async (what, index) => new Uint8Array(await (await ask(`/api/propose/${what}/${index}`)).arrayBuffer()),
  };
}
