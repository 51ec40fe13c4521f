// Heatmaps that follow a click: each network's are the tiles of one picture, one tile for each cell of the grid.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const fields = [...document.querySelectorAll(".field")];
  const thumbs = [...document.querySelectorAll("[data-sample]")];
  const status = document.getElementById("heatmap-status");
  // Inferno at nine places, between which colors are mixed.
  const inferno = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10],
    [249, 201, 50], [252, 255, 164]];
  const colors = Array.from({length: 256}, (_, value) => {
    const place = value / 255 * (inferno.length - 1), low = Math.min(Math.floor(place), inferno.length - 2);
    return inferno[low].map((start, channel) => start + (inferno[low + 1][channel] - start) * (place - low));
  });
  let sample = -1, cell = [0, 0];
  const atlases = new Map();

  const image = index => document.getElementById(`image-${index}`);
  for (const thumb of thumbs) thumb.firstElementChild.src = image(thumb.dataset.sample).src;

  async function atlas(index, network) {
    const key = `${index},${network}`;
    if (!atlases.has(key)) {
      const picture = new Image();
      picture.src = data.heatmaps[index].networks[network].atlas;
      await picture.decode();
      const canvas = document.createElement("canvas");
      canvas.width = picture.naturalWidth;
      canvas.height = picture.naturalHeight;
      const context = canvas.getContext("2d", {willReadFrequently: true});
      context.drawImage(picture, 0, 0);
      atlases.set(key, context);
    }
    return atlases.get(key);
  }

  function overlay(context, maps) {
    const [height, width] = maps.tile;
    const tile = context.getImageData(cell[1] * width, cell[0] * height, width, height);
    for (let at = 0; at < tile.data.length; at += 4) {
      const value = tile.data[at];
      colors[value].forEach((color, channel) => { tile.data[at + channel] = color; });
      tile.data[at + 3] = Math.min(235, 2 * value);
    }
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(tile, 0, 0);
    return canvas;
  }

  function mark(context, x, y, size) {
    for (const [color, line] of [["#000", 4], ["#7df9ff", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = line * size / 10;
      context.beginPath();
      context.arc(x, y, size, 0, 2 * Math.PI);
      context.moveTo(x - 0.6 * size, y);
      context.lineTo(x + 0.6 * size, y);
      context.moveTo(x, y - 0.6 * size);
      context.lineTo(x, y + 0.6 * size);
      context.stroke();
    }
  }

  async function draw() {
    const index = sample, maps = data.heatmaps[index], [height, width] = maps.size;
    const base = image(index);
    await base.decode();
    const row = maps.rows[cell[0]], col = maps.cols[cell[1]], number = cell[0] * maps.cols.length + cell[1];
    const said = [];
    for (const field of fields) {
      const network = maps.networks[field.dataset.network];
      const context = await atlas(index, field.dataset.network);
      if (index !== sample) return;  // another image was chosen meanwhile
      const canvas = field.firstElementChild;
      const scale = Math.max(1, Math.ceil(640 / Math.max(height, width)));
      canvas.width = width * scale;
      canvas.height = height * scale;
      const target = canvas.getContext("2d");
      target.filter = "grayscale(1) brightness(0.75)";
      target.drawImage(base, 0, 0, canvas.width, canvas.height);
      target.filter = "none";
      target.drawImage(overlay(context, maps), 0, 0, canvas.width, canvas.height);
      mark(target, (col + 0.5) * scale, (row + 0.5) * scale, Math.max(canvas.width, canvas.height) / 45);
      const name = data.classes[network.classes[number]];
      said.push(`${network.title}: ${name}, half of the gradient within ${network.radii[number].toFixed(1)} px`);
    }
    status.textContent = `Row ${row}, column ${col}. ${said.join("; ")}.`;
  }

  function choose(index) {
    sample = index;
    for (const thumb of thumbs) thumb.setAttribute("aria-pressed", String(Number(thumb.dataset.sample) === index));
    const maps = data.heatmaps[index];
    cell = [Math.floor(maps.rows.length / 2), Math.floor(maps.cols.length / 2)];
    draw();
  }

  function move(row, col) {
    const maps = data.heatmaps[sample];
    const next = [Math.min(Math.max(row, 0), maps.rows.length - 1), Math.min(Math.max(col, 0), maps.cols.length - 1)];
    if (next[0] === cell[0] && next[1] === cell[1]) return;
    cell = next;
    draw();
  }

  for (const field of fields) {
    const follow = event => {
      const box = field.getBoundingClientRect(), maps = data.heatmaps[sample];
      move(Math.floor((event.clientY - box.top) / box.height * maps.rows.length),
        Math.floor((event.clientX - box.left) / box.width * maps.cols.length));
    };
    field.addEventListener("click", follow);
    field.addEventListener("pointermove", event => { if (event.buttons === 1) follow(event); });
    field.addEventListener("keydown", event => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!step) return;
      event.preventDefault();
      move(cell[0] + step[0], cell[1] + step[1]);
    });
  }
  for (const thumb of thumbs) thumb.addEventListener("click", () => choose(Number(thumb.dataset.sample)));

  const legend = document.querySelector("canvas.scale").getContext("2d");
  colors.forEach((color, value) => {
    legend.fillStyle = `rgb(${color.map(Math.round).join(",")})`;
    legend.fillRect(value * 180 / 256, 0, 1, 10);
  });
  choose(0);
})();
