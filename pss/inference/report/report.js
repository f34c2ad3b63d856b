"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const get = (id) => document.getElementById(id);
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => { const all = style("--series").split(/\s+/); return all[number % all.length]; };
const rhoLabel = (rho) => (rho === null ? "as trained" : `ρ ${+rho.toPrecision(3)}`);
// Charts take tags and entities in names for their own, and text of another direction would turn the figures beside it.
const plain = (name) => name.replace(/[&<>]/g, (found) => `&#${found.charCodeAt(0)};`);
const apart = (name) => `\u2068${name}\u2069`;
const short = (name) => (name.length > 60 ? `${name.slice(0, 30)}…${name.slice(-29)}` : name);
const symbols = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function layout(more) {
  const axis = { gridcolor: style("--line"), zeroline: false, automargin: true, fixedrange: true, linecolor: style("--line") };
  return {
    margin: { l: 44, r: 12, t: 10, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 13, color: style("--ink") },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
    showlegend: report.runs.length > 1,
    legend: { orientation: "h", y: -0.2, font: { size: 12 } },
    hovermode: "closest",
    ...more,
    xaxis: { ...axis, ...(more.xaxis || {}) },
    yaxis: { ...axis, ...(more.yaxis || {}) },
  };
}

const draw = (id, traces, more) =>
  Plotly.react(get(id), traces, layout(more || {}), { responsive: true, displayModeBar: false });

// Accuracy against cost.
const inMega = Math.max(...report.rows.map((row) => row.gflops)) < 0.1;
const flops = inMega ? "MFLOPs" : "GFLOPs";
get("cost-title").textContent = `${flops} per image`;

function drawCosts() {
  const charts = [
    ["throughput", "images_per_second", "images/s", ",.0f", 1],
    ["cost", "gflops", flops, ",.3~f", inMega ? 1000 : 1],
    ["loader", "images_per_second_with_loader", "images/s", ",.0f", 1],
    ["latency", "latency_ms", "ms", ",.3~f", 1],
  ];
  for (const [id, key, unit, form, factor] of charts) {
    const traces = report.runs.map((run, number) => {
      const rows = report.rows.filter((row) => row.run === run.name).sort((a, b) => a.rho - b.rho);
      const at = (name) => rows.map((row) => factor * row[name]);
      const spread = rows.every((row) => row[`${key}_low`] !== null);
      const trace = {
        name: plain(short(run.name)), mode: "lines+markers", x: at(key), y: rows.map((row) => row.top1),
        customdata: rows.map((row) => [rhoLabel(row.rho), row.tokens, factor * row[`${key}_low`], factor * row[`${key}_high`]]),
        line: { color: colour(number), width: 2 }, marker: { symbol: symbols[number % symbols.length], size: 8 },
        hovertemplate: `<b>%{customdata[0]}</b> · %{customdata[1]} tokens<br>top-1 %{y:.2f} %<br>%{x:${form}} ${unit}` +
          (spread ? `<br>(%{customdata[2]:${form}} to %{customdata[3]:${form}})` : "") + "<extra>%{fullData.name}</extra>",
      };
      if (spread) {
        trace.error_x = {
          type: "data", symmetric: false, thickness: 1, width: 3,
          array: rows.map((row) => factor * (row[`${key}_high`] - row[key])),
          arrayminus: rows.map((row) => factor * (row[key] - row[`${key}_low`])),
        };
      }
      return trace;
    });
    draw(id, traces, { yaxis: { ticksuffix: " %" } });
  }
}

function fillTable() {
  const line = (tag, cells) => element("tr", {}, ...cells.map((text) => element(tag, { textContent: text })));
  get("rows").append(
    element("thead", {}, line("th", report.table.headings)),
    element("tbody", {}, ...report.table.cells.map((cells) => line("td", cells))),
  );
}

// The gallery, and the map below it.
const places = (run) => run.rhos.map((rho, place) => [rho, place]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
const chosen = () => {
  const run = report.runs[get("run").value];
  return { run, place: places(run)[get("rho").value], block: +get("block").value };
};

// A run has its own operating points, and blocks to look into where patches leave on the way.
function setSliders() {
  const run = report.runs[get("run").value];
  const last = run.rhos.length - 1;
  get("rho").max = last;
  get("rho").value = last;
  get("rho-label").hidden = last === 0;
  get("block").max = run.blocks;
  get("block").value = run.blocks;
  get("block-label").hidden = !run.pictures.some((picture) => picture.views.some((view) => view.depths));
}

function buildGallery() {
  const { run } = chosen();
  const [height, width] = run.grid;
  get("gallery").replaceChildren(...run.pictures.map((picture) => {
    const image = element("img", { src: picture.source, alt: picture.label });
    image.onload = () => image.classList.toggle("small", image.naturalWidth <= 64);
    const veil = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    veil.setAttribute("viewBox", `0 0 ${width} ${height}`);
    veil.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    return element("figure", { className: "card" },
      element("div", { className: "frame" }, image, veil),
      element("figcaption", {}, element("div", { className: "answer" }), element("div", { className: "label", textContent: `labelled ${apart(picture.label)}` })));
  }));
}

function showRho() {
  const { run, place, block } = chosen();
  const [height, width] = run.grid;
  const patches = height * width;
  const rho = run.rhos[place];
  [...get("gallery").children].forEach((card, number) => {
    const view = run.pictures[number].views[place];
    const kept = new Set(view.kept);
    const seen = (patch) => (view.depths ? view.depths[patch] >= block : kept.has(patch));
    let path = "";
    for (let patch = 0; patch < patches; patch++)
      if (!seen(patch)) path += `M${patch % width} ${Math.floor(patch / width)}h1v1h-1z`;
    card.querySelector("path").setAttribute("d", path);
    const [prediction, chance] = view.top[0];
    const right = prediction === run.pictures[number].label;
    const answer = card.querySelector(".answer");
    answer.className = `answer ${right ? "right" : "wrong"}`;
    answer.textContent = `${right ? "✓" : "✗"} ${apart(prediction)} ${percent(chance)}`;
    answer.title = view.top.map(([name, share]) => `${apart(name)} ${percent(share)}`).join("\n");
    Object.assign(card.dataset, { kept: view.kept.length, prediction, probability: chance });
  });
  get("state").textContent =
    `${rhoLabel(rho)}: ${run.kept[place]} of ${patches} patches, ${run.tokens[place]} tokens` +
    (get("block-label").hidden || block === run.blocks ? "" : `; shown: what block ${block} of ${run.blocks} sees`);
  drawMap(run, place);
  drawClasses(run, place);
}

function drawMap(run, place) {
  const [height, width] = run.grid;
  const shares = run.frequencies[place];
  const z = Array.from({ length: height }, (_, row) => shares.slice(row * width, (row + 1) * width));
  const low = Math.min(...shares), high = Math.max(...shares);
  get("map-title").textContent = `${rhoLabel(run.rhos[place])}: kept in ` +
    `${percent(low)} to ${percent(high)} of all images`;
  draw("map", [{
    type: "heatmap", z, zmin: low === high ? 0 : low, zmax: high, colorscale: "Cividis", xgap: 1, ygap: 1,
    hovertemplate: "row %{y}, column %{x}<br>kept in %{z:.1%} of the images<extra></extra>",
    colorbar: { tickformat: ".0%", thickness: 12, outlinewidth: 0 },
  }], {
    showlegend: false,
    margin: { l: 10, r: 10, t: 10, b: 10 },
    xaxis: { visible: false, constrain: "domain" }, yaxis: { visible: false, autorange: "reversed", scaleanchor: "x", constrain: "domain" },
  });
}

// Right and wrong by class.
function drawClasses(run, place) {
  const { names, sizes, all, points } = run.classes;
  const { right, matrix, confusions } = points[place];
  const count = names.length, some = count < all;
  const ticks = names.map((name) => plain(apart(name.length > 18 ? `${name.slice(0, 17)}…` : name)));
  const where = rhoLabel(run.rhos[place]);
  const numbers = names.map((_, number) => number);
  const tall = `${Math.max(320, 150 + 16 * count)}px`;
  get("right").style.height = get("matrix").style.height = tall;
  get("classes-note").hidden = !some;
  get("classes-note").textContent = `The ${count} of ${all} classes that the model gets right least often at its largest ρ.`;
  get("right-title").textContent = `${where}: right answers by class`;
  const axis = { tickvals: numbers, ticktext: ticks, tickfont: { size: 11 } };
  draw("right", [{
    type: "bar", orientation: "h", y: numbers, x: right.map((value, number) => 100 * value / sizes[number]),
    customdata: names.map((name, number) => [plain(apart(short(name))), right[number], sizes[number]]),
    marker: { color: style("--accent") },
    hovertemplate: "%{customdata[0]}<br>%{customdata[1]:,} of %{customdata[2]:,} right (%{x:.1f} %)<extra></extra>",
  }], {
    showlegend: false, bargap: 0.3,
    xaxis: { range: [0, 100], ticksuffix: " %", nticks: 6 }, yaxis: { ...axis, autorange: "reversed", showgrid: false },
  });
  const columns = some ? [...names, "others"] : names;
  const shares = matrix.map((row, number) => row.slice(0, columns.length).map((value) => value / sizes[number]));
  draw("matrix", [{
    type: "heatmap", z: shares, zmin: 0, zmax: 1, colorscale: "Cividis", xgap: 1, ygap: 1,
    customdata: matrix.map((row, number) => columns.map((name, other) =>
      [plain(apart(short(names[number]))), plain(apart(short(name))), row[other]])),
    hovertemplate: "%{customdata[0]} taken for %{customdata[1]}<br>%{customdata[2]:,} images (%{z:.1%})<extra></extra>",
    colorbar: { tickformat: ".0%", thickness: 12, outlinewidth: 0 },
  }], {
    showlegend: false,
    xaxis: { ...axis, tickvals: columns.map((_, number) => number), ticktext: some ? [...ticks, "others"] : ticks, tickangle: -90, showgrid: false },
    yaxis: { ...axis, autorange: "reversed", showgrid: false },
  });
  get("confusions-title").textContent =
    confusions.length ? `${where}: the mistakes made most often` : `${where}: no mistakes`;
  const line = (tag, cells) => element("tr", {}, ...cells.map((text) => element(tag, { textContent: text })));
  get("confusions").replaceChildren(...(confusions.length ? [
    element("thead", {}, line("th", ["class", "taken for", "images", "of the class"])),
    element("tbody", {}, ...confusions.map(([name, answer, images, share]) =>
      line("td", [apart(short(name)), apart(short(answer)), images.toLocaleString("en"), percent(share)]))),
  ] : []));
}

// Training curves.
const trained = report.runs.some((run) => run.training);

function drawTraining() {
  if (!trained) return;
  const axis = document.querySelector("input[name=axis]:checked").value;
  for (const key of ["loss", "val_loss", "top1"]) {
    const traces = report.runs.map((run, number) => run.training && {
      name: plain(short(run.name)), mode: key === "loss" ? "lines" : "lines+markers", x: run.training[key][axis], y: run.training[key].values,
      line: { color: colour(number), width: 2 }, marker: { symbol: symbols[number % symbols.length], size: 5 },
      hovertemplate: `${axis === "steps" ? "step %{x:,}" : "%{x:.3~g} h"}<br>%{y:.4~g}<extra>%{fullData.name}</extra>`,
    }).filter((trace) => trace && trace.x.length);
    get(key).parentElement.hidden = !traces.length;  // a run without a validation split has none
    if (!traces.length) continue;
    draw(key, traces, { xaxis: { title: { text: axis, standoff: 4 }, nticks: 6 } });
  }
}

function drawAll() {
  drawCosts();
  showRho();
  drawTraining();
}

get("run").append(...report.runs.map((run, number) => element("option", { value: number, textContent: apart(short(run.name)) })));
get("run-label").hidden = report.runs.length < 2;
setSliders();
get("training").hidden = !trained;
get("rho").addEventListener("input", showRho);
get("block").addEventListener("input", showRho);
get("run").addEventListener("change", () => { setSliders(); buildGallery(); showRho(); });
document.querySelectorAll("input[name=axis]").forEach((radio) => radio.addEventListener("change", drawTraining));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
fillTable();
buildGallery();
drawAll();
