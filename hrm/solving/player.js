"use strict";
// Shows a step of a path on the page. Its contents were computed before: see player.py.
(() => {
  const trace = JSON.parse(document.getElementById("trace").textContent);
  const { symbols } = trace;
  const paths = new Map([trace, ...trace.others].map((one) => [one.path, one]));
  const at = (id) => document.getElementById(id);
  const board = document.querySelector("#frame .board");
  const squares = [...board.querySelectorAll("td")];
  const shape = squares.map((square) => square.className.split(" ").filter((name) => "xy".includes(name) || name === "given"));
  const tracks = [];
  let { path, steps, gates } = trace;
  let now = steps.length - 1;
  let gate = null;
  let timer = null;

  const make = (parent, tag, name = "", text = "") => {
    const element = parent.appendChild(document.createElement(tag));
    element.className = name;
    element.textContent = text;
    return element;
  };
  const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
  const fixed = (value) => (value === null ? "not a number" : value.toFixed(3));
  function drawBoard(step) {
    const fresh = new Set(step.changed), broken = new Set(step.marked);
    const before = now ? steps[now - 1].board : trace.start;
    const heat = gate && gate.cells[now];
    board.classList.toggle("hot", Boolean(heat));
    squares.forEach((square, i) => {
      const [name, text, words] = symbols[step.board[i]];
      const told = [`row ${trace.places[i][0]}, column ${trace.places[i][1]}: ${words}`];
      const classes = [...shape[i], name];
      if (fresh.has(i)) {
        classes.push("new");
        told.push(`was ${symbols[before[i]][2]}`);
      }
      if (broken.has(i)) {
        classes.push("bad");
        told.push("breaks a rule");
      }
      if (heat) {
        square.style.setProperty("--g", gate.most > gate.least ? ((heat[i] ?? gate.least) - gate.least) / (gate.most - gate.least) : 0);
        told.push(`gate ${fixed(heat[i])}`);
      }
      square.className = classes.join(" ");
      square.textContent = text;
      square.title = told.join(", ");
    });
    board.querySelector("table").setAttribute("aria-label", `Board after step ${now + 1}`);
    at("scale").hidden = !heat;
    if (heat) {
      at("least").textContent = `${gate.name} ${fixed(gate.least)}`;
      at("most").textContent = fixed(gate.most);
    }
  }

  function summary(step) {
    const parts = [step.changed === null ? "First board" : `${plural(step.changed.length, "cell")} changed`];
    if (step.wrong !== null) parts.push(step.wrong ? `${plural(step.wrong, "cell")} wrong` : "every cell right");
    if (trace.ruled) parts.push(step.problems.length ? `${plural(step.problems.length, "rule")} broken` : "no rule broken");
    parts.push(`${step.sure} sure`);
    return `${parts.join(", ")}. The model would ${step.halts ? "stop here" : "continue"}.`;
  }

  function show(index) {
    now = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[now];
    drawBoard(step);
    at("now").textContent = `Step ${now + 1} of ${steps.length}${paths.size > 1 ? `, path ${path}` : ""}`;
    at("said").textContent = summary(step);
    at("step").value = now + 1;
    at("step").setAttribute("aria-valuetext", `step ${now + 1} of ${steps.length}`);
    at("previous").disabled = now === 0;
    at("next").disabled = now === steps.length - 1;
    at("broken").textContent = step.problems.length ? `Rules broken: ${step.problems.length}` : "";
    at("problems").hidden = !step.problems.length;
    at("problems").replaceChildren();
    for (const problem of step.problems) make(at("problems"), "li", "", problem);
    for (const { bars, value, values, text } of tracks) {
      bars.forEach((bar, i) => bar.classList.toggle("here", i === now));
      value.textContent = text(values[now], now);
    }
  }

  function stop() {
    clearTimeout(timer);
    timer = null;
    at("play").textContent = "Play";
    at("said").removeAttribute("aria-live");
  }
  function wait() {
    timer = setTimeout(() => {
      show(now + 1);
      if (now === steps.length - 1) stop();
      else wait();
    }, 1000 / at("speed").value);
  }
  function play() {
    if (now === steps.length - 1) show(0);
    at("play").textContent = "Pause";
    at("said").setAttribute("aria-live", "off");
    wait();
  }
  const toggle = () => (timer === null ? play() : stop());
  const go = (index) => {
    stop();
    show(index);
  };

  // A row of the timeline: a name, a bar for each step, the value at the step that is shown.
  function track(parent, name, values, top, text, label) {
    const title = label || make(parent, "span", "name");
    if (!label) title.textContent = name;
    const chart = make(parent, "div", "bars");
    chart.setAttribute("aria-hidden", "true");
    const bars = values.map((value, i) => {
      const bar = make(chart, "i");
      bar.title = `step ${i + 1}: ${text(value, i)}`;
      bar.style.setProperty("--v", top ? (value || 0) / top : 0);
      return bar;
    });
    const jump = (event) => {
      const { left, width } = chart.getBoundingClientRect();
      go(Math.floor(((event.clientX - left) / width) * steps.length));
    };
    chart.addEventListener("pointerdown", (event) => {
      chart.setPointerCapture(event.pointerId);
      jump(event);
    });
    chart.addEventListener("pointermove", (event) => event.buttons && jump(event));
    tracks.push({ bars, value: make(parent, "output", "value"), values, text });
    return chart;
  }

  function confidence() {
    const values = steps.map((step) => step.q_halt);
    const chart = track(at("tracks"), "Confidence", values, 1, (_, i) => steps[i].sure);
    chart.classList.add("tall");
    chart.classList.toggle("many", steps.length > 40);
    [...chart.children].forEach((bar, i) => make(bar, "b", steps[i].halts ? "halts" : ""));
    const space = "http://www.w3.org/2000/svg";
    const svg = chart.appendChild(document.createElementNS(space, "svg"));
    svg.setAttribute("viewBox", `0 0 ${steps.length} 1`);
    svg.setAttribute("preserveAspectRatio", "none");
    for (const [name, key] of [["going", "q_continue"], ["curve", "q_halt"]]) {
      const known = steps.map((step, i) => [i + 0.5, step[key]]).filter(([, value]) => value !== null);
      const line = svg.appendChild(document.createElementNS(space, "polyline"));
      line.setAttribute("class", name);
      line.setAttribute("points", known.map(([x, value]) => `${x},${1 - value}`).join(" "));
    }
    const words = steps.some((step) => step.q_continue !== null) ? "q_halt; filled: would stop; dashed: q_continue" : "q_halt; filled: would stop";
    make(chart.previousElementSibling, "small", "", words);
  }

  function count(name, kind, values) {
    const most = Math.max(...values.map((value) => value || 0));
    const chart = track(at("tracks"), name, values, most, (value) => (value === null ? "-" : String(value)));
    chart.classList.add(kind);
  }

  function gateTracks() {
    const top = Math.max(...gates.flatMap((one) => one.means.map((value) => value || 0)));
    gates.forEach((one, i) => {
      const label = make(at("gates"), "label");
      const radio = make(label, "input");
      Object.assign(radio, { type: "radio", name: "gate", value: i });
      const name = make(label, "span", "name", one.name);
      if (one.words) make(name, "small", "", one.words);
      track(at("gates"), one.name, one.means, top, fixed, label).classList.add("gate");
    });
    make(at("gates"), "span", "plain", `L: the low level, H: the high level. 0 is shut, 1 open; the highest bar is ${fixed(top)}.`);
    at("gates").hidden = false;
  }

  const noGate = [...at("gates").children];
  // The tracks of the path that is played, from its last step.
  function load(number) {
    stop();
    ({ path, steps, gates } = paths.get(number));
    tracks.length = 0;
    gate = null;
    at("tracks").replaceChildren();
    at("gates").replaceChildren(...noGate);
    at("gates").querySelector("input").checked = true;
    at("step").max = steps.length;
    confidence();
    count("Cells changed", "changed", steps.map((step) => step.changed && step.changed.length));
    if (trace.answered) count("Cells wrong", "wrong", steps.map((step) => step.wrong));
    if (trace.ruled) count("Rules broken", "broken", steps.map((step) => step.problems.length));
    if (gates.length) gateTracks();
    show(steps.length - 1);
  }

  at("gates").addEventListener("change", (event) => {
    gate = gates[event.target.value] || null;
    show(now);
  });
  if (at("paths")) at("paths").addEventListener("change", (event) => load(Number(event.target.value)));
  at("play").addEventListener("click", toggle);
  at("previous").addEventListener("click", () => go(now - 1));
  at("next").addEventListener("click", () => go(now + 1));
  at("step").addEventListener("input", (event) => go(event.target.value - 1));
  const keys = { ArrowLeft: () => go(now - 1), ArrowRight: () => go(now + 1), Home: () => go(0), End: () => go(steps.length - 1), " ": toggle };
  document.addEventListener("keydown", (event) => {
    const { target, key } = event;
    if (!Object.hasOwn(keys, key) || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // These have the keys for themselves; a button has the space bar.
    if (target.closest("input, select") || (key === " " && target.closest("button"))) return;
    event.preventDefault();
    keys[key]();
  });
  // A finger that goes up or down scrolls the page; a mouse marks text, to be copied.
  let from = null;
  const frame = at("frame");
  frame.addEventListener("pointerdown", (event) => {
    from = event.isPrimary && event.pointerType !== "mouse" ? event.clientX : null;
  });
  frame.addEventListener("pointercancel", () => (from = null));
  frame.addEventListener("pointerup", (event) => {
    const way = from === null ? 0 : event.clientX - from;
    from = null;
    if (Math.abs(way) > 40) go(now + (way < 0 ? 1 : -1));
  });

  document.documentElement.classList.add("playing");
  at("player").hidden = false;
  load(path);
})();
