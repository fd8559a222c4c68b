"use strict";
// Shared by all pages: creating elements, and drawing maps as images.
// Untrusted text is set only with textContent and setAttribute, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// matplotlib's viridis at 17 equidistant points, interpolated linearly in between.
const VIRIDIS = [
  [68, 1, 84], [72, 24, 106], [71, 45, 123], [66, 64, 134], [59, 82, 139], [51, 99, 141], [44, 114, 142],
  [38, 130, 142], [33, 145, 140], [31, 160, 136], [40, 174, 128], [63, 188, 115], [94, 201, 98], [132, 212, 75],
  [173, 220, 48], [216, 226, 25], [253, 231, 37],
];

function viridis(share) {
  const position = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(position), VIRIDIS.length - 2);
  return VIRIDIS[low].map((from, i) => Math.round(from + (position - low) * (VIRIDIS[low + 1][i] - from)));
}

// A map as a data: URL of an image with one pixel per cell. Low cells are nearly transparent.
function mapUrl(map) {
  const canvas = make("canvas", { width: map.columns, height: map.rows });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(map.columns, map.rows);
  const cells = atob(map.cells);
  for (let i = 0; i < cells.length; i++) {
    const share = cells.charCodeAt(i) / 255;
    pixels.data.set([...viridis(share), Math.round(255 * (0.1 + 0.75 * share))], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}
