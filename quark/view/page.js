"use strict";
// Every text of a pool is set as textContent, never as HTML.
const byId = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const drawn = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const number = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
const whole = (value) => value.toLocaleString("en-US");
let sources = [];
let offset = 0;
let total = 0;
let lastRounds = "";

async function ask(what, parameters = {}) {
  const answer = await fetch(`${what}?${new URLSearchParams(parameters)}`);
  const said = await answer.json();
  if (!answer.ok) throw new Error(said && said.error ? said.error : "no answer");
  return said;
}

function tell(text, isError) {
  byId("state").textContent = text;
  byId("state").className = isError ? "error" : "";
}

function chart(rounds) {
  const place = byId("chart");
  const width = Math.max(place.clientWidth, 240), height = 260, left = 56, bottom = 28, top = 10, right = 12, inset = 14;
  const known = rounds.filter((row) => row.mean !== null);
  if (!known.length) { place.replaceChildren(make("p", "No scored samples yet.")); return; }
  const values = known.flatMap((row) => [row.mean - row.half, row.mean + row.half, row.held_out].filter((v) => v !== null));
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= 0.5; high += 0.5; }
  const firstRound = known[0].round, lastRound = known[known.length - 1].round;
  const x = (round) => left + inset + (width - left - right - 2 * inset) * (lastRound === firstRound ? 0.5 : (round - firstRound) / (lastRound - firstRound));
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Mean reward of each round" });
  for (let tick = 0; tick <= 4; tick += 1) {
    const value = low + ((high - low) * tick) / 4;
    svg.append(drawn("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  const every = Math.ceil((known.length * 40) / (width - left));
  svg.append(drawn("polyline", { class: "line", points: known.map((row) => `${x(row.round)},${y(row.mean)}`).join(" ") }));
  known.forEach((row, at) => {
    if (at % every === 0) svg.append(drawn("text", { x: x(row.round), y: height - 8, "text-anchor": "middle" }, String(row.round)));
    svg.append(drawn("line", { class: "interval", x1: x(row.round), x2: x(row.round), y1: y(row.mean - row.half), y2: y(row.mean + row.half) }));
    if (row.held_out !== null) svg.append(drawn("rect", { class: "held", x: x(row.round) - 4, y: y(row.held_out) - 4, width: 8, height: 8 }));
    const said = `round ${row.round}: mean reward ${number(row.mean)} ± ${number(row.half)}, ${whole(row.n)} samples`
      + (row.held_out === null ? "" : `, held out ${number(row.held_out)}`) + (row.kl === null ? "" : `, KL ${number(row.kl)} nats per token`);
    const point = drawn("circle", { class: "point", cx: x(row.round), cy: y(row.mean), r: 6, tabindex: 0, role: "button", "aria-label": said });
    point.append(drawn("title", {}, said));
    const choose = () => { byId("filter").elements.round.value = row.round; offset = 0; show(); };
    point.addEventListener("click", choose);
    point.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } });
    svg.append(point);
  });
  place.replaceChildren(svg);
}

async function draw() {
  const rounds = await ask("rounds", { source: byId("source").value });
  const now = JSON.stringify(rounds);
  if (now !== lastRounds) { lastRounds = now; chart(rounds); }
}

async function show() {
  const wanted = Object.fromEntries(new FormData(byId("filter")));
  tell("reading");
  try {
    const found = await ask("samples", { ...wanted, source: byId("source").value, offset });
    total = found.total;
    const rows = found.rows.map((sample) => {
      const row = make("tr");
      row.tabIndex = 0;
      const quantile = sample.quantile < 0 ? "–" : String(sample.quantile);
      for (const text of [sample.id, sample.round, quantile, number(sample.reward)]) row.append(make("td", String(text)));
      const text = make("td");
      text.append(make("span", sample.prompt, "prompt"), make("span", sample.completion));
      row.append(text);
      row.addEventListener("click", () => explain(sample.id));
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") explain(sample.id); });
      return row;
    });
    document.querySelector("#samples tbody").replaceChildren(...rows);
    byId("count").textContent = total ? `${whole(offset + 1)} to ${whole(offset + rows.length)} of ${whole(total)}` : "No sample fits.";
    byId("before").disabled = offset === 0;
    byId("after").disabled = offset + rows.length >= total;
    tell("");
  } catch (error) { tell(error.message, true); }
}

async function explain(id) {
  try {
    const found = await ask("explain", { source: byId("source").value, id });
    const place = byId("detail");
    const facts = make("dl");
    const fact = (name, value) => facts.append(make("dt", name), make("dd", String(value)));
    fact("prompt", found.prompt);
    fact("completion", found.completion);
    fact("tokens", found.tokens);
    fact("sampled in", `round ${found.round}, chunk ${found.chunk}, after ${whole(found.policy_step)} optimizer steps`);
    fact("reward token", found.reward_token < 0 ? "none" : found.reward_token);
    fact("log-probability", `${number(found.logprob_policy)} nats under the policy, ${number(found.logprob_reference)} under the original model`);
    fact("seed", found.seed);
    fact("key", found.key);
    fact("prompt metadata", found.prompt_metadata);
    fact("settings", found.settings);
    const table = (heads, rows) => {
      const node = make("table"), head = make("tr"), body = make("tbody");
      heads.forEach((text) => head.append(make("th", text)));
      rows.forEach((cells) => { const row = make("tr"); cells.forEach((text) => row.append(make("td", String(text)))); body.append(row); });
      const first = make("thead"); first.append(head); node.append(first, body);
      return node;
    };
    const rank = (value) => (value === null ? "–" : whole(value));
    place.replaceChildren(
      make("h2", `Sample ${found.id}`), facts,
      table(["score", "value", "rank", "of", "quantile"], found.scores.map((s) => [s.column, number(s.score), rank(s.rank), whole(s.num_scored), s.quantile < 0 ? "–" : `${s.quantile} of 0..${found.quantiles - 1}`])),
      make("h2", "Steps whose batch held it"),
      found.rounds.length ? table(["round", "quantile", "steps"], found.rounds.map((use) => [use.round, use.quantile < 0 ? "–" : use.quantile, use.steps.join(", ") || "none"])) : make("p", "Not known, or none yet."),
    );
    place.hidden = false;
    place.focus();
    place.scrollIntoView({ block: "start" });
    tell("");
  } catch (error) { tell(error.message, true); }
}

async function choose() {
  const source = sources[Number(byId("source").value)];
  const select = byId("filter").elements.quantile;
  select.replaceChildren(new Option("all", ""));
  for (let quantile = source.quantiles - 1; quantile >= 0; quantile -= 1) select.add(new Option(String(quantile), String(quantile)));
  byId("filter").elements.round.value = "";
  byId("detail").hidden = true;
  offset = 0;
  lastRounds = "";
  try { await draw(); } catch (error) { tell(error.message, true); return; }
  await show();
}

async function begin() {
  sources = await ask("sources");
  sources.forEach((source, at) => byId("source").add(new Option(`${source.name} (${source.kind})`, String(at))));
  byId("source").addEventListener("change", choose);
  byId("filter").addEventListener("submit", (event) => { event.preventDefault(); offset = 0; show(); });
  byId("before").addEventListener("click", () => { offset = Math.max(0, offset - 50); show(); });
  byId("after").addEventListener("click", () => { offset += 50; show(); });
  await choose();
  window.addEventListener("resize", () => { lastRounds = ""; draw().catch(() => {}); });
  setInterval(() => draw().catch((error) => tell(error.message, true)), 5000);
}
begin().catch((error) => tell(error.message, true));
