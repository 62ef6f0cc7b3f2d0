// Draws regions on an image with the mouse. Gradio calls this with `element`, `props`, `watch` of a gr.HTML:
// props.source is {url, width, height} of the image or null, props.value the regions, in the image's own pixels:
// [{box: [x0, y0, x1, y1]} or {points: [[x, y, label], ...]} or both, ...].
const svg = element.querySelector("svg");
const shown = element.querySelector("img");
const MIN_DRAG = 4; // pixels of the screen: less is a click
let mode = "box";
let start = null; // where the box that is being drawn began
let draft = null; // that box

const clamp = (value, high) => Math.min(Math.max(value, 0), high);

// Return the pixel of the image under the pointer, whatever the size at which the image is shown.
function position(event) {
  const frame = svg.getBoundingClientRect();
  const { width, height } = props.source;
  return [
    clamp(((event.clientX - frame.left) / frame.width) * width, width),
    clamp(((event.clientY - frame.top) / frame.height) * height, height),
  ];
}

function add(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  svg.append(node);
}

function drawBox([x0, y0, x1, y1]) {
  add("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
}

function draw() {
  const source = props.source;
  const regions = props.value || [];
  svg.replaceChildren();
  element.querySelector(".stage").style.display = source ? "block" : "none";
  for (const button of element.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", button.dataset.mode === mode);
  }
  const count = element.querySelector(".count");
  count.textContent = source ? `${regions.length} region${regions.length === 1 ? "" : "s"}` : "";
  if (!source) return;
  if (shown.getAttribute("src") !== source.url) shown.src = source.url;
  svg.setAttribute("viewBox", `0 0 ${source.width} ${source.height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const unit = source.width / (svg.getBoundingClientRect().width || source.width); // image pixels of a screen pixel
  regions.forEach(({ box, points }, index) => {
    if (box) drawBox(box);
    for (const [x, y, label] of points || []) {
      add("circle", { cx: x, cy: y, r: 5 * unit, class: label ? "" : "excluded" });
    }
    const [x, y] = box || [points[0][0] + 6 * unit, points[0][1] - 20 * unit];
    add("text", { x: x + 4 * unit, y: y + 16 * unit, "font-size": 15 * unit }, index + 1);
  });
  if (draft) drawBox(draft);
}

function setRegions(regions) {
  props.value = regions;
  draw();
}

// Add a point: a region of its own, or one more of the last region.
function addPoint([x, y]) {
  const { width, height } = props.source;
  const point = [Math.min(x, width - 0.5), Math.min(y, height - 0.5), mode === "exclude" ? 0 : 1];
  const regions = props.value || [];
  const last = regions[regions.length - 1];
  if (mode === "point" || (mode === "add" && !last)) {
    setRegions([...regions, { points: [point] }]);
  } else if (last) {
    setRegions([...regions.slice(0, -1), { ...last, points: [...(last.points || []), point] }]);
  }
}

function undo() {
  const regions = (props.value || []).slice(0, -1);
  const last = (props.value || []).at(-1);
  if (last && last.points && last.points.length + (last.box ? 1 : 0) > 1) {
    const points = last.points.slice(0, -1);
    regions.push(points.length ? { ...last, points } : { box: last.box });
  }
  setRegions(regions);
}

svg.addEventListener("pointerdown", (event) => {
  if (!props.source || event.button !== 0) return;
  event.preventDefault();
  if (mode !== "box") return addPoint(position(event));
  start = { at: position(event), x: event.clientX, y: event.clientY };
  svg.setPointerCapture(event.pointerId);
});
svg.addEventListener("pointermove", (event) => {
  if (!start) return;
  const [x, y] = position(event);
  draft = [Math.min(start.at[0], x), Math.min(start.at[1], y), Math.max(start.at[0], x), Math.max(start.at[1], y)];
  draw();
});
svg.addEventListener("pointerup", (event) => {
  const isDragged =
    start && Math.abs(event.clientX - start.x) >= MIN_DRAG && Math.abs(event.clientY - start.y) >= MIN_DRAG;
  const box = draft;
  start = draft = null;
  if (isDragged && box && box[2] > box[0] && box[3] > box[1]) setRegions([...(props.value || []), { box }]);
  else draw();
});
svg.addEventListener("pointercancel", () => {
  start = draft = null;
  draw();
});
element.querySelector(".tools").addEventListener("click", ({ target }) => {
  if (target.dataset.mode) mode = target.dataset.mode;
  if (target.dataset.action === "clear") setRegions([]);
  else if (target.dataset.action === "undo") undo();
  else draw();
});
new ResizeObserver(draw).observe(shown); // numbers and points keep their size on the screen
watch(["value", "source"], draw);
draw();
