// Draws every chart of the page; sets data-drawn on the root to how many, once all are there.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const options = { mode: "vega-lite", renderer: "svg", actions: false, config: read("theme") };
let drawn = 0;
for (const figure of document.querySelectorAll("figure[data-spec]")) {
  const place = figure.querySelector(".chart");
  const sized = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
  try {
    await vegaEmbed(place, { ...read(figure.dataset.spec), ...sized }, options);
    drawn += 1;
  } catch (error) {
    place.textContent = `This chart cannot be drawn: ${error}`;
    console.error(error);
  }
}
document.documentElement.dataset.drawn = drawn;
