// Drawing: an inpainting mask by brush, and labelled boxes by dragging.

import { bitmapOf, button, h, pngOf } from "./dom.js";

const MASK_COLOUR = "rgba(99, 91, 255, 0.62)";
const BOX_COLOURS = ["#e5484d", "#0f9d58", "#2563eb", "#b45309", "#9333ea", "#0e7490"];
const UNDO_STEPS = 30;

/** An image or file input with paste, drop and preview. `changed(blob)` is called with null when cleared. */
export class ImagePicker {
  constructor(element, label, changed) {
    this.element = element;
    this.changed = changed;
    this.blob = null;
    const id = element.dataset.picker === "image" ? "image" : undefined;
    this.input = h("input", { type: "file", accept: "image/png,image/jpeg,image/webp", id, "aria-label": label,
      onchange: () => this.input.files[0] && this.set(this.input.files[0]) });
    this.preview = h("img", { alt: "", hidden: true });
    this.clearButton = button("Remove", () => this.set(null), `Remove ${label}`);
    this.clearButton.hidden = true;
    element.append(this.preview, this.input, this.clearButton);
    element.ondragover = (event) => { event.preventDefault(); element.classList.add("over"); };
    element.ondragleave = () => element.classList.remove("over");
    element.ondrop = (event) => {
      event.preventDefault();
      event.stopPropagation();
      element.classList.remove("over");
      const file = event.dataTransfer.files[0];
      if (file?.type.startsWith("image/")) this.set(file);
    };
  }

  set(blob) {
    this.blob = blob;
    if (this.preview.src) URL.revokeObjectURL(this.preview.src);
    if (blob) this.preview.src = URL.createObjectURL(blob);
    else this.input.value = "";
    this.preview.hidden = this.clearButton.hidden = !blob;
    this.changed(blob);
  }
}

/** What both editors share: an image, a canvas over it and positions in image pixels. */
class Editor {
  constructor(element, label) {
    this.canvas = h("canvas", { tabindex: "0", role: "application", "aria-label": label });
    this.context = this.canvas.getContext("2d");
    this.stage = h("div", { class: "stage" }, this.canvas);
    element.append(this.stage);
    this.image = null;
    this.canvas.onpointerdown = (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.begin(this.position(event));
    };
    this.canvas.onpointermove = (event) => this.canvas.hasPointerCapture(event.pointerId) && this.move(this.position(event));
    this.canvas.onpointerup = (event) => this.end(this.position(event));
  }

  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  resize(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
  }
}

/** Paints a mask: white where the image is to be repainted. */
export class MaskEditor extends Editor {
  constructor(element) {
    super(element, "Mask. Arrow keys move the brush, Space paints, Z undoes.");
    this.mask = new OffscreenCanvas(1, 1);
    this.strokes = [];
    this.cursor = null;
    this.size = h("input", { type: "range", min: "2", max: "50", value: "16", "aria-label": "Brush size, percent of the width" });
    element.append(h("div", { class: "row wrap" }, h("span", { class: "small" }, "Brush"), this.size,
      button("Undo", () => this.undo()), button("Invert", () => this.invert()), button("Clear", () => this.clear())));
    this.canvas.onkeydown = (event) => this.onKey(event);
    this.stage.hidden = true;
  }

  async setImage(blob) {
    this.stage.hidden = !blob;
    this.image = blob && (await bitmapOf(blob));
    if (!this.image) return;
    this.resize(this.image.width, this.image.height);
    this.mask = new OffscreenCanvas(this.image.width, this.image.height);
    this.strokes = [];
    this.cursor = null;
    this.draw();
  }

  get brush() { return Math.max(1, (Number(this.size.value) / 100) * this.canvas.width); }
  get pen() {
    const pen = this.mask.getContext("2d", { willReadFrequently: true });
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = this.brush;
    pen.strokeStyle = pen.fillStyle = "white";
    return pen;
  }

  remember() {
    this.strokes.push(this.pen.getImageData(0, 0, this.mask.width, this.mask.height));
    if (this.strokes.length > UNDO_STEPS) this.strokes.shift();
  }

  begin(at) { this.remember(); this.last = at; this.move(at); }
  move(at) {
    const pen = this.pen;
    pen.beginPath();
    pen.moveTo(...this.last);
    pen.lineTo(at[0] + 0.01, at[1]);
    pen.stroke();
    this.last = at;
    this.draw();
  }
  end() { this.canvas.dispatchEvent(new Event("change")); }

  onKey(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) {
      const [x, y] = this.cursor ?? [this.canvas.width / 2, this.canvas.height / 2];
      const [dx, dy] = steps[event.key], by = this.brush / 2;
      this.cursor = [Math.min(this.canvas.width, Math.max(0, x + dx * by)), Math.min(this.canvas.height, Math.max(0, y + dy * by))];
      this.draw();
    } else if (event.key === " ") {
      this.cursor ??= [this.canvas.width / 2, this.canvas.height / 2];
      this.begin(this.cursor);
    } else if (event.key === "z") this.undo();
    else return;
    event.preventDefault();
  }

  undo() {
    const before = this.strokes.pop();
    if (before) this.pen.putImageData(before, 0, 0);
    this.draw();
  }
  invert() {
    this.remember();
    const pen = this.pen, data = pen.getImageData(0, 0, this.mask.width, this.mask.height);
    for (let i = 0; i < data.data.length; i += 4) {
      const white = data.data[i + 3] > 127 ? 0 : 255;
      data.data.fill(white, i, i + 4);
    }
    pen.putImageData(data, 0, 0);
    this.draw();
  }
  clear() { this.remember(); this.pen.clearRect(0, 0, this.mask.width, this.mask.height); this.draw(); }

  draw() {
    const { context, canvas } = this;
    context.globalCompositeOperation = "copy";
    context.drawImage(this.mask, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = MASK_COLOUR;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "destination-over";
    context.drawImage(this.image, 0, 0);
    context.globalCompositeOperation = "source-over";
    if (this.cursor) {
      context.strokeStyle = "#fff";
      context.lineWidth = Math.max(1, canvas.width / 200);
      context.beginPath();
      context.arc(...this.cursor, this.brush / 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  /** The mask as a PNG, white on black; null where nothing is painted. */
  async blob() {
    const { width, height } = this.mask;
    const alpha = this.pen.getImageData(0, 0, width, height).data;
    if (!alpha.some((value, i) => i % 4 === 3 && value > 127)) return null;
    const canvas = h("canvas", { width, height }), pen = canvas.getContext("2d");
    pen.fillStyle = "black";
    pen.fillRect(0, 0, width, height);
    pen.drawImage(this.mask, 0, 0);
    return pngOf(canvas);
  }
}

/** Drags boxes with labels; also a list of number fields, for keyboards. */
export class BoxEditor extends Editor {
  constructor(element, changed) {
    super(element, "Drag to place an object; the list below has the same boxes as numbers");
    this.boxes = [];
    this.changed = changed;
    this.list = h("ul", { class: "boxes" });
    element.append(this.list, h("div", { class: "row wrap" },
      button("Add box", () => this.add({ x: 0.25, y: 0.25, w: 0.5, h: 0.5 })), button("Clear", () => this.set([]))));
    this.resize(256, 256);
    this.draw();
  }

  setRatio(width, height) {
    this.resize(256, Math.max(32, Math.round((256 * height) / width)));
    this.draw();
  }

  parts([x, y]) { return [x / this.canvas.width, y / this.canvas.height].map((v) => Math.min(1, Math.max(0, v))); }
  begin(at) { this.from = this.parts(at); this.dragged = null; }
  move(at) {
    const [x, y] = this.parts(at), [x0, y0] = this.from;
    this.dragged = { x: Math.min(x, x0), y: Math.min(y, y0), w: Math.abs(x - x0), h: Math.abs(y - y0) };
    this.draw();
  }
  end() {
    const box = this.dragged;
    this.dragged = null;
    if (box && box.w > 0.02 && box.h > 0.02) this.add(box);
    this.draw();
  }

  add(box) {
    const round = (v) => Math.round(v * 1000) / 1000;
    this.set([...this.boxes, { name: box.name ?? "", x: round(box.x), y: round(box.y), w: round(box.w), h: round(box.h) }]);
    this.list.lastElementChild.querySelector("input").focus();
  }

  set(boxes) {
    this.boxes = boxes.map((box) => ({ ...box }));
    this.list.replaceChildren(...this.boxes.map((box, i) => this.entry(box, i)));
    this.draw();
    this.changed();
  }

  entry(box, index) {
    const field = (name, title) => h("input", {
      "aria-label": `Box ${index + 1}: ${title}`, placeholder: title, value: box[name],
      ...(name === "name" ? { list: "labels", autocomplete: "off" } : { inputmode: "decimal" }),
      oninput: (event) => {
        box[name] = name === "name" ? event.target.value : Number(event.target.value);
        this.draw();
        this.changed();
      },
    });
    const fields = [["name", "label"], ["x", "left"], ["y", "top"], ["w", "width"], ["h", "height"]].map(([name, title]) => field(name, title));
    return h("li", {}, ...fields, button("×", () => this.set(this.boxes.filter((_, i) => i !== index)), `Delete box ${index + 1}`));
  }

  draw() {
    const { context, canvas } = this;
    context.fillStyle = matchMedia("(prefers-color-scheme: dark)").matches ? "#232731" : "#eceef3";
    context.fillRect(0, 0, canvas.width, canvas.height);
    [...this.boxes, this.dragged].forEach((box, i) => {
      if (!box) return;
      const colour = BOX_COLOURS[i % BOX_COLOURS.length];
      const at = [box.x * canvas.width, box.y * canvas.height, box.w * canvas.width, box.h * canvas.height];
      context.fillStyle = `${colour}33`;
      context.strokeStyle = colour;
      context.lineWidth = 2;
      context.fillRect(...at);
      context.strokeRect(...at);
      context.fillStyle = colour;
      context.font = "600 12px system-ui";
      context.fillText(box.name || "?", at[0] + 5, at[1] + 15);
    });
  }
}
