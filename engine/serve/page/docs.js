// /openapi.json as a page, without anything from elsewhere.

function make(name, words, ...children) {
  const made = document.createElement(name);
  if (words) made.textContent = words;
  made.append(...children);
  return made;
}

const named = schema => schema?.$ref?.split("/").pop();

function kind(schema) {
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.anyOf) return schema.anyOf.map(kind).join(" | ");
  if (schema.$ref) return named(schema);
  const own = [schema.type ?? "any"].flat().join(" | ");
  return schema.type === "array" && schema.items ? `${own} of ${kind(schema.items)}` : own;
}

function row(name, schema, required) {
  const usual = schema.default === undefined ? "" : `default ${JSON.stringify(schema.default)}`;
  const most = schema.maximum === undefined ? "" : `at most ${schema.maximum}`;
  const about = [required ? "required" : "", usual, most, schema.description ?? ""].filter(Boolean).join("; ");
  return make("tr", "", make("td", "", make("code", name)), make("td", kind(schema)), make("td", about));
}

function fields(schema, within = "") {
  return Object.entries(schema.properties ?? {}).flatMap(([name, one]) => {
    const inner = one.items?.properties ? [one.items, "[]."] : [one, "."];
    return [row(within + name, one, false), ...fields(inner[0], within + name + inner[1])];
  });
}

function answer(name, schema) {
  const found = make("section", "", make("h2", name), make("p", schema.description));
  found.className = "endpoint";
  found.id = name;
  found.append(make("table", "", make("tbody", "", ...fields(schema))));
  return found;
}

function endpoint(path, method, about) {
  const place = make("code", "", make("b", method.toUpperCase()), ` ${path}`);
  const found = make("section", "", make("h2", "", place), ...(about.description ?? about.summary).split("\n\n").map(text => make("p", text)));
  found.className = "endpoint";
  const rows = (about.parameters ?? []).map(one => row(`${one.name} (${one.in})`, { ...one.schema, ...one }, one.required));
  const schema = about.requestBody?.content?.["application/json"]?.schema;
  for (const [name, one] of Object.entries(schema?.properties ?? {}))
    rows.push(row(name, one, schema.required?.includes(name)));
  if (rows.length) found.append(make("table", "", make("tbody", "", ...rows)));
  if (schema?.description) found.append(make("p", schema.description));
  for (const [status, one] of Object.entries(about.responses ?? {})) {
    const name = named(one.content?.["application/json"]?.schema);
    if (!name || status === "default") continue;
    const link = make("a", name);
    link.href = `#${name}`;
    found.append(make("p", `Answers ${status}: `, link));
  }
  return found;
}

const told = await (await fetch("/openapi.json")).json();
const sections = Object.entries(told.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, about]) => endpoint(path, method, about)));
const answers = Object.entries(told.components.schemas).map(([name, schema]) => answer(name, schema));
document.getElementById("docs").replaceChildren(make("p", told.info.description), ...sections, ...answers);
document.getElementById(location.hash.slice(1))?.scrollIntoView();
