// Classifies a picture on the page itself, with the graphs in the folder that the page lies in.
import { fit } from "./fit.mjs";

const { library, runtime, dtype, scale } = document.body.dataset;
const [file, drop, shown, labels, template, status, scores] = [
  "file", "drop", "shown", "labels", "template", "status", "scores",
].map((id) => document.getElementById(id));
const hint = shown.textContent;
const textEmbeds = new Map();
const MOST_TEXTS = 1000;
let tower, tokenizer, processor, RawImage, textTower;
let imageEmbeds = null;
let withoutPicture = status.textContent;
let timer;
// Only the last picture and the last request are shown.
let picture = 0;
let request = 0;

function say(words, wrong = false) {
  status.textContent = words;
  status.classList.toggle("wrong", wrong);
}

function normalise(row) {
  const length = Math.hypot(...row);
  return row.map((value) => value / length);
}

async function load() {
  const transformers = await import(library);
  const { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, env } = transformers;
  RawImage = transformers.RawImage;
  // From this folder alone, and anew after each export.
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "./", useBrowserCache: false });
  if (runtime) env.backends.onnx.wasm.wasmPaths = new URL(runtime, document.baseURI).href;
  [tokenizer, processor, textTower, tower] = await Promise.all([
    AutoTokenizer.from_pretrained("."),
    AutoProcessor.from_pretrained("."),
    CLIPTextModelWithProjection.from_pretrained(".", { dtype }),
    CLIPVisionModelWithProjection.from_pretrained(".", { dtype }),
  ]);
}

// Returns the embeddings of sentences, each computed once.
async function embed(sentences) {
  if (textEmbeds.size > MOST_TEXTS) textEmbeds.clear();
  const fresh = sentences.filter((sentence) => !textEmbeds.has(sentence));
  if (fresh.length) {
    const { text_embeds } = await textTower(tokenizer(fresh, { padding: true, truncation: true }));
    text_embeds.tolist().forEach((row, i) => textEmbeds.set(fresh[i], normalise(row)));
  }
  return sentences.map((sentence) => textEmbeds.get(sentence));
}

function show(names, logits) {
  const most = Math.max(...logits);
  const shares = logits.map((logit) => Math.exp(logit - most));
  const sum = shares.reduce((a, b) => a + b, 0);
  const rows = names.map((name, i) => [name, shares[i] / sum]).sort((a, b) => b[1] - a[1]);
  scores.replaceChildren(
    ...rows.map(([name, share]) => {
      const row = document.createElement("li");
      row.style.setProperty("--share", `${100 * share}%`);
      for (const words of [name, `${(100 * share).toFixed(1)} %`]) {
        row.appendChild(document.createElement("span")).textContent = words;
      }
      return row;
    }),
  );
}

async function classify() {
  const mine = ++request;
  const names = [...new Set(labels.value.split(/[,\n]/).map((name) => name.trim()).filter(Boolean))];
  scores.replaceChildren();
  if (!imageEmbeds) return say(withoutPicture);
  if (!names.length) return say("Write at least one label.", true);
  if (!template.value.includes("{}")) return say("The sentence needs {}, for the label.", true);
  const texts = await embed(names.map((name) => template.value.replaceAll("{}", () => name)));
  if (mine !== request) return;
  say("");
  show(names, texts.map((text) => scale * text.reduce((sum, value, i) => sum + value * imageEmbeds[i], 0)));
}

async function take(blob) {
  const mine = ++picture;
  imageEmbeds = null;
  withoutPicture = "Reading the picture…";
  await classify(); // what stands there belongs to the picture before
  await loaded;
  let embeds;
  try {
    const image = fit(await RawImage.fromBlob(blob), processor.image_processor);
    const { image_embeds } = await tower(await processor(image));
    embeds = normalise(image_embeds.tolist()[0]);
  } catch (error) {
    if (mine !== picture) return;
    withoutPicture = "Choose a picture.";
    shown.textContent = hint;
    return say(`This can't be read as a picture: ${error.message}`, true);
  }
  if (mine !== picture) return;
  imageEmbeds = embeds;
  const element = document.createElement("img");
  element.alt = "Your picture";
  element.src = URL.createObjectURL(blob);
  element.onload = () => URL.revokeObjectURL(element.src);
  shown.replaceChildren(element);
  await classify();
}

const guarded = (action) => (...values) => action(...values).catch((error) => say(error.message, true));
const takeFirst = guarded(async (files) => files.length && take(files[0]));
const classifyAgain = guarded(classify);

// Every label that is typed passes through many that aren't meant.
function typed() {
  request++;
  scores.replaceChildren();
  clearTimeout(timer);
  timer = setTimeout(classifyAgain, 200);
}

const loaded = load();
file.addEventListener("change", () => takeFirst(file.files));
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
// On the whole page, since a browser would open a picture that is dropped beside.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  takeFirst(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => takeFirst(event.clipboardData.files));
for (const field of [labels, template]) field.addEventListener("input", typed);

try {
  await loaded;
  if (!picture) say((withoutPicture = "Choose a picture."));
  // A browser may keep what was chosen when the page is loaded again.
  if (!picture && file.files.length) takeFirst(file.files);
} catch (error) {
  say(`The model can't be loaded: ${error.message}`, true);
}
