// Resizes and crops a picture as the model's image processor does in Python: Pillow's resampling, with antialiasing,
// to the shorter edge, and the middle cut out. The resizing of transformers.js has no antialiasing; it leaves a picture
// that has the model's size already as it is.

// Pillow's filters by their numbers, with how far they reach.
const FILTERS = {
  2: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  3: {
    reach: 2,
    weight: (x) => {
      const [a, t] = [-0.5, Math.abs(x)];
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      return t < 2 ? ((t - 5) * t + 8) * t * a - 4 * a : 0;
    },
  },
};

// For each place of a line of `to` values: the first of the `from` values that count, and their weights.
function lineWeights(from, to, { reach, weight }) {
  const scale = from / to;
  const wide = Math.max(scale, 1);
  return Array.from({ length: to }, (_, place) => {
    const middle = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(middle - reach * wide + 0.5));
    const end = Math.min(from, Math.floor(middle + reach * wide + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => weight((i + first - middle + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((value) => value / sum) };
  });
}

// Returns the rows of an RGB picture with their lengths changed; a line is `step` values apart within itself.
function resizeLines(data, lines, lineStride, from, to, step, filter) {
  if (from === to) return data;
  const places = lineWeights(from, to, filter);
  const along = step === 3; // a row; otherwise a column
  const found = new Uint8ClampedArray(lines * to * 3);
  for (let line = 0; line < lines; ++line) {
    for (let place = 0; place < to; ++place) {
      const { first, weights } = places[place];
      for (let channel = 0; channel < 3; ++channel) {
        let sum = 0;
        for (let i = 0; i < weights.length; ++i) {
          sum += weights[i] * data[line * lineStride + (first + i) * step + channel];
        }
        const at = along ? (line * to + place) * 3 : (place * lines + line) * 3;
        found[at + channel] = Math.floor(sum + 0.5);
      }
    }
  }
  return found;
}

// Returns a picture's pixels as RGB; what is transparent is laid over white.
function overWhite({ data, channels }) {
  if (channels === 3) return data;
  const found = new Uint8ClampedArray((data.length / channels) * 3);
  for (let pixel = 0; pixel < data.length / channels; ++pixel) {
    const from = pixel * channels;
    const alpha = channels === 4 ? data[from + 3] : channels === 2 ? data[from + 1] : 255;
    for (let channel = 0; channel < 3; ++channel) {
      const value = data[from + (channels > 2 ? channel : 0)];
      found[pixel * 3 + channel] = Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return found;
}

// As Python rounds: halves to the even neighbour.
const roundHalf = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/**
 * Return a RawImage of transformers.js that has the model's size.
 *
 * @param {RawImage} image Of 1 to 4 channels, of any size.
 * @param {{size, do_center_crop, crop_size, resample}} processor An image processor of transformers.js, or `preprocessor_config.json`.
 */
export function fit(image, { size, do_center_crop: crops, crop_size: crop, resample }) {
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`resample is ${resample}; it must be 2 (bilinear) or 3 (bicubic).`);
  const shorter = Math.min(image.width, image.height);
  const side = (length) => (length === shorter ? size.shortest_edge : Math.floor((size.shortest_edge * length) / shorter));
  const [width, height] = size.shortest_edge ? [side(image.width), side(image.height)] : [size.width, size.height];
  let data = resizeLines(overWhite(image), image.height, image.width * 3, image.width, width, 3, filter);
  data = resizeLines(data, width, 3, image.height, height, width * 3, filter);
  const wanted = crops ? crop : { width, height };
  if (wanted.width > width || wanted.height > height) throw new Error("crop_size is larger than size.");
  const [left, top] = [roundHalf((width - wanted.width) / 2), roundHalf((height - wanted.height) / 2)];
  const found = new Uint8ClampedArray(wanted.width * wanted.height * 3);
  for (let row = 0; row < wanted.height; ++row) {
    const from = ((row + top) * width + left) * 3;
    found.set(data.subarray(from, from + wanted.width * 3), row * wanted.width * 3);
  }
  return new image.constructor(found, wanted.width, wanted.height, 3);
}
