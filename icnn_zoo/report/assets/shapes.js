// Kernel shapes that can be turned: points (column, row, channel) in orthographic projection.
(() => {
  const canvas = document.getElementById("turn");
  if (!canvas) return;  // a regular network has no shapes
  const data = JSON.parse(document.getElementById("data").textContent);
  const select = document.getElementById("layer");
  const status = document.getElementById("shapes-status");
  const buttons = [...document.querySelectorAll("[data-view]")];
  const views = {flat: [0, 0], space: [-0.65, 0.45]};  // turned around the upright axis, then tilted, in radians
  let view = [...views.space], layer, points, waiting = false;

  function unpack(index) {
    layer = data.layers[index];
    const bytes = Uint8Array.from(atob(layer.positions), letter => letter.charCodeAt(0));
    const numbers = new DataView(bytes.buffer), taps = layer.colors.length;
    points = Array.from({length: layer.count * taps}, (_, at) => ({
      row: numbers.getInt16(4 * at, true) * layer.scale,
      col: numbers.getInt16(4 * at + 2, true) * layer.scale,
      depth: layer.count > 1 ? 2 * Math.floor(at / taps) / (layer.count - 1) - 1 : 0,
      color: layer.colors[at % taps],
    }));
    const drawn = layer.count < layer.total ? `, ${layer.count} of them drawn` : "";
    status.textContent = `${layer.total} ${layer.total === 1 ? "shape" : "shapes"}${drawn}; ` +
      `crosses and lines: ${layer.ellipses.length ? "regular grid" : "center"}` +
      (layer.ellipses.length ? "; ellipses: two standard deviations of each cloud" : "") +
      (layer.spreads.length ? "; dotted: how widely taps read (spread)." : ".");
    canvas.setAttribute("aria-label", `Kernel shapes of ${layer.name}, ${layer.total} shapes`);
    plan();
  }

  function project(col, row, depth) {
    const [turn, tilt] = view, reach = layer.reach, x = col / reach, y = row / reach, z = 1.1 * depth;
    const side = x * Math.cos(turn) + z * Math.sin(turn), deep = z * Math.cos(turn) - x * Math.sin(turn);
    return [side, y * Math.cos(tilt) - deep * Math.sin(tilt), y * Math.sin(tilt) + deep * Math.cos(tilt)];
  }

  function draw() {
    waiting = false;
    const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(box.width * ratio));
    canvas.height = Math.max(1, Math.round(box.height * ratio));
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const quiet = style.getPropertyValue("--quiet"), rule = style.getPropertyValue("--rule");
    const flat = view[0] === 0 && view[1] === 0;
    const scale = Math.min(box.width, box.height) / (flat ? 2.5 : 3.3), middle = [box.width / 2, box.height / 2];
    const place = (col, row, depth) => {
      const [x, y, z] = project(col, row, depth);
      return [middle[0] + scale * x, middle[1] + scale * y, z];
    };
    const line = (from, to) => {
      context.beginPath();
      context.moveTo(...place(...from).slice(0, 2));
      context.lineTo(...place(...to).slice(0, 2));
      context.stroke();
    };
    context.scale(ratio, ratio);
    frame(context, line, place, rule, quiet, flat);
    const size = Math.min(5, Math.max(1.6, 120 / Math.sqrt(points.length)));
    context.globalAlpha = Math.min(0.85, Math.max(0.22, 22 / Math.sqrt(points.length)));
    const placed = points.map(point => [...place(point.col, point.row, point.depth), point.color]);
    if (!flat) placed.sort((first, second) => second[2] - first[2]);  // what is near covers what is far
    for (const [x, y, , color] of placed) {
      context.fillStyle = color;
      context.beginPath();
      context.arc(x, y, size, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
    context.strokeStyle = quiet;
    context.lineWidth = 1;
    for (const [row, col] of layer.grid) {
      if (!flat) { line([col, row, -1], [col, row, 1]); continue; }
      const [x, y] = place(col, row, 0);
      context.strokeStyle = style.getPropertyValue("--ink");
      context.beginPath();
      context.moveTo(x - 5, y); context.lineTo(x + 5, y);
      context.moveTo(x, y - 5); context.lineTo(x, y + 5);
      context.stroke();
    }
    if (flat) ellipses(context, place, scale);
  }

  function frame(context, line, place, rule, quiet, flat) {
    const reach = layer.reach, corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(pair => pair.map(sign => sign * reach));
    context.strokeStyle = rule;
    context.lineWidth = 1;
    for (const depth of flat ? [0] : [-1, 1]) {
      corners.forEach((corner, index) => line([...corner, depth], [...corners[(index + 1) % 4], depth]));
    }
    if (!flat) for (const corner of corners) line([...corner, -1], [...corner, 1]);
    context.fillStyle = quiet;
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    const label = (text, col, row, depth) => context.fillText(text, ...place(col, row, depth).slice(0, 2));
    const inset = flat ? 1.08 : 1.12;
    label(`column, ${(-reach).toFixed(1)} to ${reach.toFixed(1)} px`, 0, inset * reach, -1);
    label("row", -1.12 * reach, 0, -1);
    if (!flat) label("channel", -inset * reach, inset * reach, 0);
  }

  function ellipses(context, place, scale) {
    const unit = scale / layer.reach;
    context.lineWidth = 1.6;
    layer.ellipses.forEach(([row, col, length, width, angle], tap) => {
      const [x, y] = place(col, row, 0);
      context.strokeStyle = layer.colors[tap];
      context.beginPath();
      context.ellipse(x, y, 2 * length * unit, 2 * width * unit, angle * Math.PI / 180, 0, 2 * Math.PI);
      context.stroke();
    });
    context.setLineDash([2, 3]);
    layer.spreads.forEach(([tap, row, col, height, width]) => {
      context.strokeStyle = layer.colors[tap];
      context.beginPath();
      context.ellipse(...place(col, row, 0).slice(0, 2), width * unit, height * unit, 0, 0, 2 * Math.PI);
      context.stroke();
    });
    context.setLineDash([]);
  }

  function plan() {
    if (!waiting) { waiting = true; requestAnimationFrame(draw); }
  }

  function turn(by, tilt) {
    view = [view[0] + by, Math.min(Math.max(view[1] + tilt, -Math.PI / 2), Math.PI / 2)];
    for (const button of buttons) button.setAttribute("aria-pressed", "false");
    plan();
  }

  function show(name) {
    view = [...views[name]];
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.view === name));
    plan();
  }

  let held = null;
  canvas.addEventListener("pointerdown", event => {
    held = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!held) return;
    turn((event.clientX - held[0]) / 150, (event.clientY - held[1]) / 150);
    held = [event.clientX, event.clientY];
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { held = null; });
  canvas.addEventListener("keydown", event => {
    const step = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1]}[event.key];
    if (!step) return;
    event.preventDefault();
    turn(...step);
  });
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.view));
  select.addEventListener("change", () => unpack(Number(select.value)));
  new ResizeObserver(plan).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plan);
  unpack(0);
  show("space");
})();
