// Looking at what a segmenter finds: the page of `lagm serve`, and the widget of `compare`.

const MOST_KEPT = 24; // pictures that a page keeps

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    name in node ? (node[name] = value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const rgb = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
const percent = share => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const megabytes = bytes => `${Math.ceil(bytes / 1e6)} MB`;

/** Draws a PNG into a new canvas, its colours as they are stored. */
async function drawn(blob) {
  const bitmap = await createImageBitmap(blob, {colorSpaceConversion: "none", premultiplyAlpha: "none"});
  const canvas = element("canvas", {width: bitmap.width, height: bitmap.height});
  canvas.getContext("2d", {willReadFrequently: true}).drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas;
}

// ---- the page of `lagm serve`

/** What the server says of a file: facts, picture and mask, one after the other in its answer. */
function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const at = 4 + length;
  const png = (from, to) => new Blob([buffer.slice(from, to)], {type: "image/png"});
  return {facts, picture: png(at, at + facts.picture), mask: png(at + facts.picture)};
}

export class Viewer {
  constructor(root, token) {
    this.root = root;
    this.token = token;
    this.found = [];
    this.index = -1;
    this.hidden = new Set();
    this.queue = Promise.resolve();
    this.waiting = 0;
    root.classList.add("lagm-viewer");
  }

  async ask(path, options = {}) {
    let answer;
    try {
      answer = await fetch(path, {...options, headers: {"X-Token": this.token}});
    } catch {
      throw new Error("`lagm serve` does not answer; start it again");
    }
    if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
    return answer;
  }

  async start() {
    try {
      this.state = await (await this.ask("/api/state")).json();
    } catch (error) {
      this.root.textContent = `The page cannot start: ${error.message}`;
      return;
    }
    this.colours = this.state.classes.map(c => rgb(c.colour));
    this.numbers = new Map(this.colours.map(([r, g, b], i) => [(r << 16) | (g << 8) | b, i]));
    this.build();
  }

  build() {
    const button = (text, title, does, extra = {}) =>
      element("button", {type: "button", title, onclick: does, ...extra}, text);
    this.input = element("input", {
      type: "file",
      multiple: true,
      accept: "image/*,.tif,.tiff,.ppm,.bmp",
      onchange: () => this.take([...this.input.files]),
    });
    this.drop = element("label", {className: "drop"}, this.input, "Drop pictures here, or choose files");
    this.status = element("div", {className: "status", role: "status"});
    this.wrong = element("ul", {className: "wrong", role: "alert"});
    this.previous = button("◀", "Previous picture (Page up)", () => this.show(this.index - 1), {
      ariaLabel: "previous picture",
    });
    this.next = button("▶", "Next picture (Page down)", () => this.show(this.index + 1), {ariaLabel: "next picture"});
    this.where = element("select", {ariaLabel: "picture", onchange: e => this.show(+e.target.value)});
    this.opacity = element("input", {
      type: "range",
      min: 0,
      max: 100,
      value: 60,
      ariaLabel: "opacity of the parts",
      title: "Opacity of the parts (o shows and hides them)",
      oninput: () => this.fade(),
    });
    this.download = element("a", {className: "button", title: "The mask as a PNG of class numbers (d)"}, "Download mask");
    this.frame = element("div", {className: "frame"});
    this.under = element("div", {className: "under"});
    this.legend = element("ul", {className: "legend", ariaLabel: "parts and their shares of the picture"});
    this.result = element(
      "div",
      {className: "result", hidden: true},
      element(
        "div",
        {className: "seen"},
        element("div", {className: "bar"}, this.previous, this.where, this.next),
        this.frame,
        this.under,
        element("div", {className: "bar"}, element("label", {}, "parts ", this.opacity), this.download),
      ),
      this.legend,
    );
    this.root.replaceChildren(
      element("h1", {}, this.state.name),
      this.drop,
      this.status,
      this.wrong,
      this.result,
      element("p", {className: "keys"}, "Keys: O shows and hides the parts, D downloads the mask, Page up and Page down change the picture."),
    );
    document.addEventListener("dragover", e => {
      e.preventDefault();
      this.drop.classList.add("over");
    });
    document.addEventListener("dragleave", e => e.relatedTarget || this.drop.classList.remove("over"));
    document.addEventListener("drop", e => {
      e.preventDefault();
      this.drop.classList.remove("over");
      this.take([...e.dataTransfer.files]);
    });
    document.addEventListener("paste", e => this.take([...e.clipboardData.files]));
    document.addEventListener("keydown", e => this.key(e));
    this.frame.addEventListener("pointermove", e => this.name(e));
    this.frame.addEventListener("pointerleave", () => (this.under.textContent = ""));
    this.say(`It knows ${this.state.classes.map(c => c.name).join(", ")}.`);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === this.where || this.index < 0) return;
    const does = {
      o: () => this.toggle(),
      d: () => this.download.click(),
      PageUp: () => this.show(this.index - 1),
      PageDown: () => this.show(this.index + 1),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  say(text) {
    this.status.textContent = text;
  }

  /** Labels files, one after the other; what cannot be labelled is said, and the others go on. */
  take(files) {
    if (!files.length) return;
    if (!this.waiting) this.wrong.replaceChildren();
    this.waiting += files.length;
    for (const file of files) this.queue = this.queue.then(() => this.one(file));
  }

  async one(file) {
    this.say(`labelling ${file.name} ...`);
    this.root.dataset.busy = "yes";
    try {
      if (file.size > this.state.most_bytes)
        throw new Error(`it has ${megabytes(file.size)}, and ${megabytes(this.state.most_bytes)} are taken at most; make it smaller`);
      const answer = await this.ask("/api/label", {method: "PUT", body: file});
      const found = unpacked(await answer.arrayBuffer());
      const [picture, mask] = await Promise.all([drawn(found.picture), drawn(found.mask)]);
      this.keep({...found, name: file.name, shown: picture, parts: this.classesOf(mask), overlay: mask});
    } catch (error) {
      this.wrong.append(element("li", {}, `${file.name}: ${error.message}`));
    }
    if (--this.waiting) return;
    this.say(this.found.length ? `${this.found.length} labelled; drop more, or download the mask` : "");
    this.root.dataset.busy = "no";
    this.input.value = "";
  }

  keep(found) {
    this.found.push(found);
    if (this.found.length > MOST_KEPT) this.found.shift();
    this.where.replaceChildren(...this.found.map((f, i) => element("option", {value: i}, `${i + 1}. ${f.name}`)));
    this.show(this.found.length - 1);
  }

  classesOf(canvas) {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const parts = new Uint8Array(canvas.width * canvas.height);
    for (let i = 0, k = 0; k < parts.length; i += 4, k++)
      parts[k] = this.numbers.get((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]) ?? 0;
    return parts;
  }

  show(index) {
    if (index < 0 || index >= this.found.length) return;
    this.index = index;
    const found = this.found[index];
    const larger = Math.max(1, Math.floor(480 / Math.max(found.shown.width, found.shown.height)));
    for (const canvas of [found.shown, found.overlay]) canvas.classList.toggle("small", larger > 1);
    const ratio = found.shown.width / found.shown.height;
    this.frame.style.width = `min(${found.shown.width * larger}px, ${70 * ratio}vh)`;
    this.frame.style.aspectRatio = `${found.shown.width} / ${found.shown.height}`;
    this.frame.replaceChildren(found.shown, found.overlay);
    this.where.value = index;
    this.previous.disabled = index === 0;
    this.next.disabled = index === this.found.length - 1;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(found.mask);
    this.download.href = this.url;
    this.download.download = `${found.name.replace(/\.[^.]*$/, "")}.png`;
    this.result.hidden = false;
    this.list(found.facts.shares);
    this.paint();
    this.fade();
    this.root.dataset.shown = found.name;
  }

  list(shares) {
    const rows = this.state.classes.map((c, i) => ({...c, i, share: shares[i]}));
    const seen = rows.filter(row => row.share > 0).sort((a, b) => b.share - a.share);
    const absent = rows.filter(row => !row.share).map(row => row.name);
    this.legend.replaceChildren(...seen.map(row => element("li", {}, this.entry(row))));
    if (absent.length) this.legend.append(element("li", {className: "absent"}, `not seen: ${absent.join(", ")}`));
  }

  entry({name, colour, i, share}) {
    const swatch = element("span", {className: "swatch"});
    swatch.style.background = i ? colour : "transparent";
    const inside = [swatch, element("span", {}, name), element("span", {className: "share"}, percent(share))];
    if (!i) return element("div", {className: "entry"}, ...inside);
    const title = `Show or hide ${name}`;
    return element(
      "button",
      {
        type: "button",
        className: "entry",
        title,
        ariaPressed: String(!this.hidden.has(i)),
        onclick: e => {
          this.hidden.has(i) ? this.hidden.delete(i) : this.hidden.add(i);
          e.currentTarget.ariaPressed = String(!this.hidden.has(i));
          this.paint();
        },
      },
      ...inside,
    );
  }

  paint() {
    const {overlay, parts} = this.found[this.index];
    const context = overlay.getContext("2d"),
      image = context.createImageData(overlay.width, overlay.height);
    for (let k = 0, i = 0; k < parts.length; k++, i += 4) {
      const part = parts[k];
      if (!part || this.hidden.has(part)) continue;
      [image.data[i], image.data[i + 1], image.data[i + 2]] = this.colours[part];
      image.data[i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  fade() {
    this.found[this.index].overlay.style.opacity = this.opacity.value / 100;
  }

  toggle() {
    const shown = +this.opacity.value;
    this.opacity.value = shown ? 0 : this.before || 60;
    this.before = shown;
    this.fade();
  }

  name(event) {
    const {shown, parts} = this.found[this.index],
      box = this.frame.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * shown.width),
      y = Math.floor(((event.clientY - box.top) / box.height) * shown.height);
    if (x < 0 || y < 0 || x >= shown.width || y >= shown.height) return;
    this.under.textContent = this.state.classes[parts[y * shown.width + x]].name;
  }
}

// ---- the widget of `compare`: two pictures, one over the other up to a line

export class Compare {
  constructor(root, names, pictures, split, moved = () => {}) {
    this.moved = moved;
    this.urls = pictures.map(bytes => URL.createObjectURL(new Blob([bytes], {type: "image/png"})));
    const [under, over] = this.urls.map((src, i) => element("img", {src, alt: names[1 - i], draggable: false}));
    this.over = over;
    this.line = element("div", {className: "line"});
    this.stage = element("div", {className: "both"}, under, over, this.line);
    this.slider = element("input", {
      type: "range",
      min: 0,
      max: 1000,
      value: 1000 * split,
      ariaLabel: `${names[0]} left of the line, ${names[1]} right of it`,
      oninput: () => this.move(this.slider.value / 1000),
    });
    root.classList.add("lagm-viewer");
    root.setAttribute("data-lm-suppress-shortcuts", "true");
    root.replaceChildren(
      element("div", {className: "names"}, element("span", {}, names[0]), element("span", {}, names[1])),
      this.stage,
      this.slider,
    );
    under.onload = () => {
      const larger = Math.max(1, Math.floor(384 / Math.max(under.naturalWidth, under.naturalHeight)));
      root.style.width = `${under.naturalWidth * larger}px`;
      if (larger > 1) this.stage.classList.add("small");
      root.dataset.ready = "yes";
    };
    const follow = e => {
      const box = this.stage.getBoundingClientRect();
      this.move(Math.min(1, Math.max(0, (e.clientX - box.left) / box.width)));
    };
    this.stage.addEventListener("pointerdown", e => {
      this.stage.setPointerCapture(e.pointerId);
      follow(e);
    });
    this.stage.addEventListener("pointermove", e => e.buttons && follow(e));
    this.move(split);
  }

  move(split) {
    this.slider.value = Math.round(1000 * split);
    this.over.style.clipPath = `inset(0 ${100 * (1 - split)}% 0 0)`;
    this.line.style.left = `${100 * split}%`;
    this.moved(split);
  }

  close() {
    this.urls.forEach(url => URL.revokeObjectURL(url));
  }
}

export default {
  render({model, el}) {
    const root = element("div");
    el.append(element("style", {}, STYLE), root);
    const bytes = name => {
      const value = model.get(name);
      return new Uint8Array(value.buffer ?? value, value.byteOffset ?? 0, value.byteLength);
    };
    const compared = new Compare(root, model.get("names"), [bytes("right"), bytes("left")], model.get("split"), split => {
      model.set("split", split);
      model.save_changes();
    });
    return () => compared.close();
  },
};

export const STYLE = `
.lagm-viewer { font: 15px/1.45 system-ui, sans-serif; max-width: 100%; color: CanvasText; }
.lagm-viewer h1 { font-size: 1.15em; margin: 4px 0 10px; overflow-wrap: anywhere; }
.lagm-viewer .drop { display: block; padding: 20px 12px; border: 2px dashed #888; border-radius: 8px; text-align: center; cursor: pointer; }
.lagm-viewer .drop.over, .lagm-viewer .drop:hover { border-color: #1a6fd6; background: color-mix(in srgb, #1a6fd6 10%, transparent); }
.lagm-viewer .drop:focus-within { outline: 3px solid #1a6fd6; outline-offset: 2px; }
.lagm-viewer .drop input { position: absolute; width: 1px; height: 1px; opacity: 0; }
.lagm-viewer .status { min-height: 1.5em; margin: 6px 0; overflow-wrap: anywhere; }
.lagm-viewer .wrong { margin: 0 0 8px; padding: 0; list-style: none; color: #c00; font-weight: 600; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { .lagm-viewer .wrong { color: #ff8080; } }
.lagm-viewer .result { display: grid; gap: 0 18px; align-items: start; }
@media (min-width: 720px) { .lagm-viewer .result { grid-template-columns: fit-content(calc(100% - 280px)) 260px; } .lagm-viewer .legend { margin-top: 46px; } }
.lagm-viewer .result[hidden] { display: none; }
.lagm-viewer .seen { min-width: 0; }
.lagm-viewer .bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 6px 0; }
.lagm-viewer .bar label { display: flex; align-items: center; gap: 6px; }
.lagm-viewer select { min-width: 0; max-width: 60%; font: inherit; padding: 4px; }
.lagm-viewer button, .lagm-viewer .button { padding: 5px 11px; border: 1px solid #888; border-radius: 5px; background: ButtonFace; color: ButtonText; font: inherit; text-decoration: none; cursor: pointer; }
.lagm-viewer button:disabled { opacity: 0.45; cursor: default; }
.lagm-viewer :is(button, .button, select, input):focus-visible { outline: 3px solid #1a6fd6; outline-offset: 1px; }
.lagm-viewer .frame { position: relative; max-width: 100%; background: #777; }
.lagm-viewer .frame canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.lagm-viewer .small { image-rendering: pixelated; }
.lagm-viewer .under { min-height: 1.5em; color: GrayText; }
.lagm-viewer .legend { margin: 6px 0; padding: 0; list-style: none; }
.lagm-viewer .entry { display: flex; gap: 8px; align-items: center; width: 100%; box-sizing: border-box; padding: 5px 8px; border: 1px solid transparent; border-radius: 5px; background: none; color: CanvasText; text-align: left; }
.lagm-viewer button.entry:hover { border-color: #888; }
.lagm-viewer button.entry[aria-pressed="false"] { opacity: 0.45; text-decoration: line-through; }
.lagm-viewer .swatch { flex: none; width: 1.1em; height: 1.1em; border: 1px solid #666; border-radius: 3px; }
.lagm-viewer .share { margin-left: auto; font-variant-numeric: tabular-nums; }
.lagm-viewer .absent, .lagm-viewer .keys { padding: 5px 8px; color: GrayText; font-size: 0.9em; }
.lagm-viewer .names { display: flex; justify-content: space-between; gap: 12px; }
.lagm-viewer .both { position: relative; touch-action: pan-y; cursor: ew-resize; user-select: none; overflow: hidden; }
.lagm-viewer .both img { display: block; width: 100%; }
.lagm-viewer .both img + img { position: absolute; inset: 0; height: 100%; }
.lagm-viewer .both.small img { image-rendering: pixelated; }
.lagm-viewer .line { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 2px #000; pointer-events: none; }
.lagm-viewer > input[type="range"] { width: 100%; margin: 6px 0 0; }
`;
