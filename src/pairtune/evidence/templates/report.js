"use strict";
// Draws the figures and runs the browser of completions. All text that is shown goes through textContent: what a model
// wrote is never markup. Nothing is fetched; the page's own policy would refuse it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Points travel as lists, which is a third of their size as objects.
  for (const figure of Object.values(data.figures)) for (const one of figure.series || [])
    one.points = one.points.map(([x, y, low, high, x_low, x_high, text]) => ({ x, y, low, high, x_low, x_high, text }));
  const NUM_COLOURS = 8, SVG = "http://www.w3.org/2000/svg";
  const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
  const switchedOff = new Set();
  const redraws = [];

  // ---------------------------------------------------------------------------------------------------------- pieces

  function svg(name, attributes = {}, parent = null, text = null) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  }

  function html(name, attributes = {}, parent = null, text = null) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  }

  const clear = (element) => { while (element.firstChild) element.removeChild(element.firstChild); };
  const known = (value) => value !== null && value !== undefined;
  const colour = (slot) => `var(--c${slot === 0 ? 0 : 1 + (slot - 1) % NUM_COLOURS})`;
  const dash = (one) => one.dashed ? "5 3" : one.slot === 0 ? "" : DASHES[Math.floor((one.slot - 1) / NUM_COLOURS) % DASHES.length];

  function shown(value) {
    if (!known(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    const digits = size >= 100 ? 1 : size >= 10 ? 2 : 3;
    return value.toFixed(digits);
  }

  const withInterval = (value, low, high) =>
    known(low) && known(high) ? `${shown(value)} [${shown(low)}, ${shown(high)}]` : shown(value);

  // One shape a slot, so that colour is never all that tells two methods apart.
  function marker(slot, x, y, size, attributes, parent) {
    const s = size, shapes = [
      `M${x - s},${y}a${s},${s} 0 1,0 ${2 * s},0a${s},${s} 0 1,0 ${-2 * s},0Z`,
      `M${x - s * .9},${y - s * .9}h${s * 1.8}v${s * 1.8}h${-s * 1.8}Z`,
      `M${x},${y - s * 1.15}L${x + s * 1.1},${y + s * .85}H${x - s * 1.1}Z`,
      `M${x},${y - s * 1.25}L${x + s * 1.25},${y}L${x},${y + s * 1.25}L${x - s * 1.25},${y}Z`,
      `M${x},${y + s * 1.15}L${x + s * 1.1},${y - s * .85}H${x - s * 1.1}Z`,
      `M${x - s * .4},${y - s * 1.1}h${s * .8}v${s * .7}h${s * .7}v${s * .8}h${-s * .7}v${s * .7}h${-s * .8}v${-s * .7}h${-s * .7}v${-s * .8}h${s * .7}Z`,
      `M${x - s * 1.1},${y - s * .6}L${x - s * .6},${y - s * 1.1}L${x},${y - s * .5}L${x + s * .6},${y - s * 1.1}L${x + s * 1.1},${y - s * .6}L${x + s * .5},${y}L${x + s * 1.1},${y + s * .6}L${x + s * .6},${y + s * 1.1}L${x},${y + s * .5}L${x - s * .6},${y + s * 1.1}L${x - s * 1.1},${y + s * .6}L${x - s * .5},${y}Z`,
      `M${x},${y - s * 1.4}L${x + s * .4},${y - s * .4}L${x + s * 1.4},${y - s * .4}L${x + s * .6},${y + s * .3}L${x + s * .9},${y + s * 1.3}L${x},${y + s * .7}L${x - s * .9},${y + s * 1.3}L${x - s * .6},${y + s * .3}L${x - s * 1.4},${y - s * .4}L${x - s * .4},${y - s * .4}Z`,
    ];
    return svg("path", { d: slot === 0 ? shapes[0] : shapes[(slot - 1) % shapes.length], ...attributes }, parent);
  }

  // ------------------------------------------------------------------------------------------------------------ axes

  function ticks(low, high, most, whole) {
    const rough = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(rough || 1));
    let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) || power * 10;
    if (whole) step = Math.max(1, Math.round(step));
    const values = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
    const digits = Math.min(8, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
    return values.map((value) => [value, Math.abs(value) >= 1e5 ? value.toExponential(0) :
      Math.abs(value) >= 1000 ? value.toLocaleString("en") : (value === 0 ? "0" : value.toFixed(digits))]);
  }

  function logTicks(low, high) {
    const values = [];
    const dense = Math.log10(high / low) < 2.5;
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const m of dense ? [1, 2, 5] : [1]) {
        const value = m * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) values.push([value, value < 0.001 || value >= 1e5 ? value.toExponential(0) : String(+value.toPrecision(3))]);
      }
    return values;
  }

  function extent(values, pad) {
    const real = values.filter((value) => known(value) && Number.isFinite(value));
    if (!real.length) return [0, 1];
    let low = real[0], high = real[0];
    for (const value of real) { if (value < low) low = value; if (value > high) high = value; }
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; return [low - room, high + room]; }
    return [low - pad * (high - low), high + pad * (high - low)];
  }

  // Room for all values, and for their intervals unless one is so wide that it would press all the rest together.
  function roomy(values, ends, pad) {
    const [low, high] = extent(values, 0), [least, most] = extent([...values, ...ends], 0), width = high - low;
    return extent([Math.max(least, low - 0.25 * width), Math.min(most, high + 0.25 * width)], pad);
  }

  const scale = (low, high, from, to, log) => log
    ? (value) => from + (Math.log(value / low) / Math.log(high / low)) * (to - from)
    : (value) => from + ((value - low) / (high - low)) * (to - from);

  // A figure's frame: the drawing, what is told beside the pointer, what a screen reader hears.
  function frame(figure, describe) {
    const plot = figure.querySelector(".plot");
    const heard = html("div", { class: "heard", "aria-live": "polite" }, figure);
    const canvas = html("div", { class: "canvas" }, plot);
    const tip = html("div", { class: "tip", hidden: "" }, plot);
    const state = { plot, tip, heard, targets: [], at: -1, picture: null };

    state.begin = (height) => {
      if (state.picture) state.picture.remove();
      const width = Math.max(240, plot.clientWidth || 600);
      const label = `${describe}. Arrow keys move from point to point.`;
      state.picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "application", "aria-roledescription": "figure", "aria-label": label });
      canvas.appendChild(state.picture);
      state.targets = [];
      state.at = -1;
      state.hide();
      listen(state);
      return [state.picture, width];
    };
    state.hide = () => { tip.hidden = true; if (state.ring) state.ring.remove(); state.ring = null; };
    state.show = (index, aloud) => {
      const target = state.targets[index];
      if (!target) return;
      state.at = index;
      clear(tip);
      html("b", {}, tip, target.name);
      for (const line of target.lines) html("div", {}, tip, line);
      if (state.ring) state.ring.remove();
      state.ring = target.box
        ? svg("rect", { ...target.box, fill: "none", stroke: "var(--text)", "stroke-width": 2 }, state.picture)
        : svg("circle", { cx: target.x, cy: target.y, r: 8, fill: "none", stroke: "var(--text)", "stroke-width": 1.5 }, state.picture);
      tip.hidden = false;
      const factor = state.picture.getBoundingClientRect().width / state.picture.viewBox.baseVal.width;
      const x = target.x * factor - canvas.scrollLeft, y = target.y * factor;
      const left = x + 14 + tip.offsetWidth > plot.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
      tip.style.left = `${Math.min(Math.max(0, left), Math.max(0, plot.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${Math.max(0, y - tip.offsetHeight - 10)}px`;
      if (aloud) heard.textContent = [target.name, ...target.lines].join(", ");
    };
    return state;
  }

  function listen(state) {
    const picture = state.picture;
    const place = (event) => {
      const box = picture.getBoundingClientRect(), factor = picture.viewBox.baseVal.width / box.width;
      return [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
    };
    const nearest = (event) => {
      const [x, y] = place(event);
      let best = -1, least = 40 * 40;
      state.targets.forEach((target, index) => {
        const inside = target.box && x >= target.box.x && x <= target.box.x + target.box.width && y >= target.box.y && y <= target.box.y + target.box.height;
        const distance = inside ? 0 : target.box ? Infinity : (target.x - x) ** 2 + (target.y - y) ** 2;
        if (distance < least) { least = distance; best = index; }
      });
      if (best >= 0) state.show(best, false); else state.hide();
    };
    picture.addEventListener("pointermove", nearest);
    picture.addEventListener("pointerdown", nearest);
    picture.addEventListener("pointerleave", () => { if (document.activeElement !== picture) state.hide(); });
    picture.addEventListener("blur", state.hide);
    picture.addEventListener("focus", () => { if (picture.matches(":focus-visible")) state.show(Math.max(0, state.at), true); });
    picture.addEventListener("keydown", (event) => {
      const last = state.targets.length - 1;
      if (last < 0) return;
      const line = state.targets[Math.max(0, state.at)].line;
      const other = (step) => {  // the next line's point that lies nearest
        const lines = [...new Set(state.targets.map((target) => target.line))];
        const wanted = lines[(lines.indexOf(line) + step + lines.length) % lines.length];
        const here = state.targets[Math.max(0, state.at)];
        let best = -1;
        state.targets.forEach((target, index) => {
          if (target.line === wanted && (best < 0 || Math.abs(target.x - here.x) < Math.abs(state.targets[best].x - here.x))) best = index;
        });
        return best;
      };
      const moves = {
        ArrowRight: () => Math.min(last, state.at + 1), ArrowLeft: () => Math.max(0, state.at - 1),
        ArrowDown: () => other(1), ArrowUp: () => other(-1), Home: () => 0, End: () => last,
      };
      if (event.key === "Escape") state.hide();
      if (!moves[event.key]) return;
      event.preventDefault();
      state.show(moves[event.key](), true);
    });
  }

  // ---------------------------------------------------------------------------------------------------------- legend

  function entries(marks) {
    const found = new Map();
    for (const mark of marks) if (mark.group && !found.has(mark.group)) found.set(mark.group, mark);
    return found;
  }

  function legend(figure, marks) {
    const groups = entries(marks);
    const key = JSON.stringify([...groups.keys()]);
    let list = figure.querySelector(".legend");
    if (list && list.dataset.groups === key) return;  // the button that was pressed keeps the focus
    if (list) clear(list);
    if (groups.size < 2) return;
    if (!list) list = html("ul", { class: "legend", "aria-label": "legend; press an entry to switch it off and on" }, figure);
    list.dataset.groups = key;
    for (const [group, mark] of groups) {
      const button = html("button", { type: "button", "aria-pressed": String(!switchedOff.has(group)), "data-group": group }, html("li", {}, list));
      const sign = svg("svg", { width: 26, height: 14, viewBox: "0 0 26 14", "aria-hidden": "true" }, button);
      if (mark.kind === "area") svg("rect", { x: 4, y: 2, width: 18, height: 10, fill: colour(mark.slot) }, sign);
      else {
        svg("path", { d: "M1,7H25", stroke: colour(mark.slot), "stroke-width": 2, "stroke-dasharray": dash(mark), fill: "none" }, sign);
        if (mark.marked !== false && mark.slot !== 0) marker(mark.slot, 13, 7, 4, { fill: colour(mark.slot) }, sign);
      }
      html("span", {}, button, group);
      button.addEventListener("click", () => {
        if (switchedOff.has(group)) switchedOff.delete(group); else switchedOff.add(group);
        apply();
      });
    }
  }

  function apply() {  // one switch for the whole page
    for (const redraw of redraws) redraw();
    for (const button of document.querySelectorAll(".legend button"))
      button.setAttribute("aria-pressed", String(!switchedOff.has(button.dataset.group)));
    for (const row of document.querySelectorAll("tr[data-group]")) row.hidden = switchedOff.has(row.dataset.group);
  }

  // ---------------------------------------------------------------------------------------------------------- charts

  function drawChart(figure, chart, view) {
    const [picture, width] = view.begin(figure.classList.contains("wide") ? Math.min(460, Math.max(300, (view.plot.clientWidth || 600) * 0.55)) : 290);
    const height = picture.viewBox.baseVal.height;
    const series = chart.series.filter((one) => !switchedOff.has(one.group));
    const points = series.flatMap((one) => one.points);
    const log = chart.x_log;
    let [x0, x1] = chart.x_range || roomy(points.map((p) => p.x), points.flatMap((p) => [p.x_low, p.x_high]), log ? 0 : 0.03);
    if (chart.x_from_zero) x0 = Math.max(x0, -0.03 * x1);
    if (log) { x0 = Math.max(x0, 1e-12) * 0.8; x1 *= 1.25; }
    const [y0, y1] = chart.y_range || roomy(points.map((p) => p.y), points.flatMap((p) => [p.low, p.high]), 0.05);
    const yTicks = ticks(y0, y1, 5, false);
    const left = 20 + 7 * Math.max(2, ...yTicks.map(([, text]) => text.length)) + 8;
    const area = { left, right: width - 12, top: 10, bottom: height - 44 };
    const px = scale(x0, x1, area.left, area.right, log), py = scale(y0, y1, area.bottom, area.top, false);
    const xTicks = log ? logTicks(x0, x1) : ticks(x0, x1, Math.max(4, Math.floor((area.right - area.left) / 70)), chart.whole_steps);
    for (const [value, text] of yTicks) {
      svg("line", { x1: area.left, x2: area.right, y1: py(value), y2: py(value), class: "grid" }, picture);
      svg("text", { x: area.left - 6, y: py(value) + 4, "text-anchor": "end" }, picture, text);
    }
    for (const [value, text] of xTicks) {
      svg("line", { x1: px(value), x2: px(value), y1: area.top, y2: area.bottom, class: "grid" }, picture);
      svg("text", { x: px(value), y: area.bottom + 16, "text-anchor": "middle" }, picture, text);
    }
    svg("path", { d: `M${area.left},${area.top}V${area.bottom}H${area.right}`, class: "axis", fill: "none" }, picture);
    const label = svg("text", { x: (area.left + area.right) / 2, y: height - 8, "text-anchor": "middle", class: "label" }, picture, chart.x_label);
    fit(label, width - 8);
    fit(svg("text", { transform: `translate(13 ${(area.top + area.bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "label" }, picture, chart.y_label), area.bottom - area.top);
    if (!series.length) svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, picture, "all lines are switched off");
    const name = `clip-${figure.dataset.figure}`.replace(/[^A-Za-z0-9-]/g, "-");
    const clip = svg("clipPath", { id: name }, svg("defs", {}, picture));
    svg("rect", { x: area.left, y: area.top - 6, width: area.right - area.left + 8, height: area.bottom - area.top + 12 }, clip);
    // Many intervals would hide what they belong to; the values under the pointer are told in any case.
    const pale = Math.min(0.65, Math.max(0.16, 25 / series.reduce((count, one) => count + (one.interval === "bars" && !one.faint ? one.points.length : 0), 1)));
    const ground = svg("g", { "clip-path": `url(#${name})` }, picture);
    // Faint ones first: the means lie on top of their seeds.
    for (const one of [...series].sort((a, b) => (b.faint || b.kind === "area") - (a.faint || a.kind === "area"))) {
      drawSeries(ground, one, px, py, pale);
    }
    series.forEach((one) => {
      for (const point of one.points) {
        const lines = [];
        if (point.text) lines.push(point.text);
        lines.push(`${chart.y_name || chart.y_label} ${withInterval(one.kind === "area" ? point.y - point.low : point.y, one.kind === "area" ? null : point.low, point.high)}`);
        lines.push(`${chart.x_name || chart.x_label} ${chart.whole_steps ? String(Math.round(point.x * 10) / 10) : withInterval(point.x, point.x_low, point.x_high)}`);
        view.targets.push({ x: px(point.x), y: py(point.y), name: one.name, lines, line: chart.series.indexOf(one) });
      }
    });
    legend(figure, chart.series);
  }

  function fit(text, room) {  // a label that is too long is set smaller, never cut
    for (let size = 12; size > 8 && text.getComputedTextLength() > room; size--) text.style.fontSize = `${size - 1}px`;
  }

  function drawSeries(parent, one, px, py, pale) {
    const stroke = colour(one.slot), group = svg("g", { opacity: one.faint ? 0.4 : 1, "data-series": one.name, "data-faint": one.faint ? "yes" : "no" }, parent);
    const points = one.points.filter((point) => Number.isFinite(px(point.x)) && Number.isFinite(py(point.y)));
    if (!points.length) return;
    const path = (get) => points.map((point) => `${px(point.x).toFixed(1)},${py(get(point)).toFixed(1)}`);
    const low = (point) => known(point.low) ? point.low : point.y, high = (point) => known(point.high) ? point.high : point.y;
    if (one.kind === "area") {
      const half = points.length > 1 ? Math.min(...points.slice(1).map((p, i) => px(p.x) - px(points[i].x))) * 0.45 : 12;
      for (const p of points) svg("rect", { x: (px(p.x) - half).toFixed(2), width: (2 * half).toFixed(2), y: py(p.y).toFixed(2), height: Math.max(0, py(p.low) - py(p.y)).toFixed(2), fill: stroke }, group);
      return;
    }
    if (one.interval === "band") svg("path", { d: `M${path(low).join("L")}L${path(high).reverse().join("L")}Z`, fill: stroke, opacity: 0.16 }, group);
    if (one.interval === "bars") for (const p of points) {
      if (known(p.low) && known(p.high)) svg("path", { d: `M${px(p.x)},${py(p.low)}V${py(p.high)}`, stroke, "stroke-width": 1, opacity: pale }, group);
      if (known(p.x_low) && known(p.x_high)) svg("path", { d: `M${px(p.x_low)},${py(p.y)}H${px(p.x_high)}`, stroke, "stroke-width": 1, opacity: pale }, group);
    }
    if (one.kind === "line" && points.length > 1) svg("path", { d: `M${path((p) => p.y).join("L")}`, fill: "none", stroke, "stroke-width": one.faint ? 1 : 2, "stroke-linejoin": "round", "stroke-dasharray": dash(one) }, group);
    if (one.kind === "points" || one.marked || points.length === 1)
      for (const p of points) marker(one.slot, px(p.x), py(p.y), one.faint ? 2.6 : 4.2, { class: "mark", fill: stroke, stroke: "var(--card)", "stroke-width": one.faint ? 0 : 1 }, group);
  }

  // ------------------------------------------------------------------------------------------------------------ rows

  function drawRows(figure, chart, view) {
    const rows = chart.rows.filter((row) => !switchedOff.has(row.group));
    const pitch = 30, top = 8, height = top + pitch * Math.max(1, rows.length) + 46;
    const [picture, width] = view.begin(height);
    const narrow = width < 520;
    const longest = Math.max(4, ...rows.map((row) => row.name.length));
    const gutter = narrow ? 10 : Math.min(width * 0.42, 7.1 * longest + 16);
    const area = { left: gutter, right: width - 14, bottom: height - 42 };
    const [x0, x1] = extent(rows.flatMap((row) => [row.value, row.low, row.high, chart.reference, ...(row.quantiles || [])]), 0.05);
    const px = scale(x0, x1, area.left, area.right, false);
    for (const [value, text] of ticks(x0, x1, Math.max(4, Math.floor((area.right - area.left) / 75)), false)) {
      svg("line", { x1: px(value), x2: px(value), y1: top, y2: area.bottom, class: "grid" }, picture);
      svg("text", { x: px(value), y: area.bottom + 16, "text-anchor": "middle" }, picture, text);
    }
    if (known(chart.reference)) svg("line", { x1: px(chart.reference), x2: px(chart.reference), y1: top, y2: area.bottom, class: "axis", "stroke-dasharray": "4 3" }, picture);
    fit(svg("text", { x: (area.left + area.right) / 2, y: height - 6, "text-anchor": "middle", class: "label" }, picture, chart.x_label), width - 8);
    rows.forEach((row, place) => {
      const y = top + pitch * (place + 0.5) + (narrow ? 6 : 0), stroke = colour(row.slot);
      const label = narrow
        ? svg("text", { x: area.left, y: y - 9, class: "label" }, picture, row.name)
        : svg("text", { x: gutter - 10, y: y + 4, "text-anchor": "end", class: "label" }, picture, row.name);
      fit(label, narrow ? width - 20 : gutter - 12);
      const bar = (low, high, thick, opacity) => svg("path", { d: `M${px(low)},${y}H${px(high)}`, stroke, "stroke-width": thick, opacity }, picture);
      if (row.quantiles) {
        const [q5, q25, q50, q75, q95] = row.quantiles;
        bar(q5, q95, 1.5, 0.8); bar(q25, q75, 9, 0.4);
        svg("path", { d: `M${px(q50)},${y - 7}V${y + 7}`, stroke, "stroke-width": 2 }, picture);
      }
      if (known(row.low) && known(row.high)) bar(row.low, row.high, 2, 0.9);
      if (known(row.value)) marker(row.slot, px(row.value), y, 5, { fill: stroke, stroke: "var(--card)", "stroke-width": 1 }, picture);
      const lines = row.text ? [row.text] : [];
      if (known(row.value)) lines.push(`${chart.x_name || chart.x_label} ${withInterval(row.value, row.low, row.high)}`);
      if (row.quantiles) lines.push(`median ${shown(row.quantiles[2])}, half of them in ${shown(row.quantiles[1])} to ${shown(row.quantiles[3])}, nine of ten in ${shown(row.quantiles[0])} to ${shown(row.quantiles[4])}`);
      view.targets.push({ x: px(known(row.value) ? row.value : row.quantiles ? row.quantiles[2] : x0), y, name: row.name, lines, line: place, box: { x: 0.5, y: y - pitch / 2 + 1 - (narrow ? 5 : 0), width: width - 1, height: pitch - 2 } });
    });
  }

  // -------------------------------------------------------------------------------------------------------- heat map

  function drawHeatMap(figure, chart, view) {
    const kept = chart.names.map((_, i) => i).filter((i) => !switchedOff.has((chart.groups || [])[i]));
    const longest = Math.max(4, ...kept.map((i) => chart.names[i].length));
    const room = view.plot.clientWidth || 600, cell = room < 480 ? 34 : 42, numbered = room < 8 * longest + cell * kept.length + 60;
    const gutter = 7.2 * (longest + (numbered ? 4 : 0)) + 14, head = numbered ? 26 : Math.min(150, 5.4 * longest + 20);
    const width = gutter + cell * kept.length + (numbered ? 8 : Math.min(110, 5 * longest)), height = head + cell * kept.length + 8;
    const [picture] = view.begin(height);
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.style.width = `${width}px`;
    picture.style.maxWidth = numbered ? "none" : "100%";
    kept.forEach((i, row) => {
      const y = head + cell * row;
      svg("text", { x: gutter - 8, y: y + cell / 2 + 4, "text-anchor": "end", class: "label" }, picture, numbered ? `${chart.names[i]} (${row + 1})` : chart.names[i]);
      const x = gutter + cell * (row + 0.5);
      if (numbered) svg("text", { x, y: head - 8, "text-anchor": "middle", class: "label" }, picture, `(${row + 1})`);
      else svg("text", { transform: `translate(${x - 4} ${head - 6}) rotate(-35)`, class: "label" }, picture, chart.names[i]);
      kept.forEach((j, column) => {
        const box = { x: gutter + cell * column, y, width: cell - 2, height: cell - 2 };
        const value = chart.values[i][j];
        if (i === j || !known(value)) { svg("rect", { ...box, fill: "var(--soft)" }, picture); return; }
        const tint = Math.min(1, Math.abs(value - 0.5) * 2);
        svg("rect", { ...box, fill: `rgba(var(${value >= 0.5 ? "--win" : "--lose"}), ${(0.06 + 0.5 * tint).toFixed(3)})` }, picture);
        svg("text", { x: box.x + cell / 2 - 1, y: y + cell / 2 + 4, "text-anchor": "middle", class: "cell" }, picture, (100 * value).toFixed(0));
        const low = (chart.lows[i] || [])[j], high = (chart.highs[i] || [])[j];
        const percent = (share) => `${(100 * share).toFixed(1)}%`;
        const interval = known(low) && known(high) ? ` [${percent(low)}, ${percent(high)}]` : "";
        view.targets.push({ x: box.x + cell / 2, y: y + cell / 2, box, line: row, name: `${chart.names[i]} against ${chart.names[j]}`, lines: [`wins ${percent(value)}${interval}`] });
      });
    });
  }

  // ------------------------------------------------------------------------------------------------------- the figures

  const DRAW = { chart: drawChart, rows: drawRows, heat_map: drawHeatMap };

  function start(figure) {
    let chart = data.figures[figure.dataset.figure];
    const choose = figure.querySelector("select");
    if (!chart && !choose) return;
    if (choose) chart = data.figures[choose.value];
    const view = frame(figure, (figure.querySelector("h3") || figure).textContent.trim());
    let drawn = 0;
    const redraw = () => { drawn = view.plot.clientWidth; DRAW[chart.type](figure, chart, view); };
    if (choose) choose.addEventListener("change", () => {
      chart = data.figures[choose.value];
      const caption = figure.querySelector("figcaption");
      if (caption) caption.textContent = chart.text;
      redraw();
    });
    redraws.push(redraw);
    redraw();
    if (window.ResizeObserver) new ResizeObserver(() => { if (Math.abs(view.plot.clientWidth - drawn) > 1) redraw(); }).observe(view.plot);
  }

  // ------------------------------------------------------------------------------------------------------- completions

  const PAGE = 8;

  function browser(root) {
    const { prompts, policies } = data.completions;
    const list = root.querySelector(".completions"), count = root.querySelector(".count"), more = root.querySelector(".more");
    const control = (name) => root.querySelector(`[name="${name}"]`);
    const [left, right, order, search] = ["left", "right", "order", "search"].map(control);
    let room = PAGE;

    const of = (policy, row) => policies[+policy.value].completions[row] || null;
    const reward = (one) => one && known(one.reward) ? one.reward : null;
    const gain = (row) => {
      const a = reward(of(left, row)), b = reward(of(right, row));
      return a === null || b === null ? null : b - a;
    };
    const length = (row) => Math.max(...[left, right].map((side) => { const one = of(side, row); return one ? (known(one.length) ? one.length : one.text.length) : -1; }));
    // What has no number stands last in every order.
    const by = (key, sign) => (a, b) => { const x = key(a), y = key(b); return x === null ? (y === null ? a - b : 1) : y === null ? -1 : sign * (x - y) || a - b; };
    const orders = { data: (a, b) => a - b, gain: by(gain, -1), loss: by(gain, 1), longest: by(length, -1) };

    function marked(parent, text, words) {  // the text, with what was searched for marked
      const lower = text.toLowerCase();
      let from = 0;
      for (let at = words ? lower.indexOf(words) : -1; at >= 0 && lower.length === text.length; at = lower.indexOf(words, from)) {
        parent.appendChild(document.createTextNode(text.slice(from, at)));
        html("mark", {}, parent, text.slice(at, at + words.length));
        from = at + words.length;
      }
      parent.appendChild(document.createTextNode(text.slice(from)));
    }

    function redraw() {
      const words = search.value.trim().toLowerCase();
      const holds = (text) => text.toLowerCase().includes(words);
      const rows = prompts.map((_, row) => row)
        .filter((row) => of(left, row) || of(right, row))
        .filter((row) => !words || holds(prompts[row]) || [left, right].some((side) => of(side, row) && holds(of(side, row).text)))
        .sort(orders[order.value]);
      clear(list);
      for (const row of rows.slice(0, room)) {
        const card = html("article", { class: "sample", "data-row": row }, list);
        marked(html("p", { class: "prompt", dir: "auto" }, card), prompts[row], words);
        const columns = html("div", { class: "columns" }, card);
        for (const side of left.value === right.value ? [left] : [left, right]) {
          const one = of(side, row), box = html("div", {}, columns), facts = [policies[+side.value].name];
          if (one) {
            if (known(one.reward)) facts.push(`reward ${one.reward.toFixed(3)}`);
            if (known(one.kl)) facts.push(`KL ${one.kl.toFixed(2)}`);
            if (known(one.length)) facts.push(`${one.length} tokens`);
            if (one.truncated) facts.push("unfinished");
          } else facts.push("no completion");
          html("span", { class: "quiet" }, box, facts.join(" · "));
          if (one) marked(html("p", { class: "completion", dir: "auto" }, box), one.text, words);
        }
      }
      count.textContent = `${Math.min(room, rows.length)} of ${rows.length} shown${words ? `; ${rows.length} of ${prompts.length} hold “${search.value.trim()}”` : ""}`;
      more.hidden = rows.length <= room;
    }

    for (const element of [left, right, order]) element.addEventListener("change", () => { room = PAGE; redraw(); });
    search.addEventListener("input", () => { room = PAGE; redraw(); });
    more.addEventListener("click", () => { room += PAGE; redraw(); });
    redraw();
  }

  for (const figure of document.querySelectorAll("[data-figure]")) start(figure);
  for (const root of document.querySelectorAll("[data-completions]")) browser(root);
  for (const table of document.querySelectorAll(".scroll")) if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
  // On paper nothing can be opened.
  const folded = [];
  window.addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open])")) { one.open = true; folded.push(one); }
  });
  window.addEventListener("afterprint", () => { while (folded.length) folded.pop().open = false; });
  document.documentElement.dataset.ready = "true";
})();
