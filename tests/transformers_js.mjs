// Loads an exported folder with transformers.js as its users do, offline, and prints what it computes as JSON.
//
// node code.mjs JOB.json, with {"models": folder of folders, "name": of one, "texts": [...],
// "pictures": [paths], "pixels": {"data": [numbers], "dims": [4 numbers]}, "labels": [...]}
import { readFile } from "node:fs/promises";
import {
  AutoProcessor,
  AutoTokenizer,
  CLIPTextModelWithProjection,
  CLIPVisionModelWithProjection,
  RawImage,
  Tensor,
  env,
  pipeline,
} from "@huggingface/transformers";

const job = JSON.parse(await readFile(process.argv[2], "utf8"));
const { fit } = await import(`${job.models}/${job.name}/fit.mjs`);
env.allowRemoteModels = false;
env.localModelPath = job.models;

const tokenizer = await AutoTokenizer.from_pretrained(job.name);
const processor = await AutoProcessor.from_pretrained(job.name);
const tokens = tokenizer(job.texts, { padding: true, truncation: true });
const pictures = await Promise.all(job.pictures.map((path) => RawImage.read(path)));
const own = await processor(pictures);
const fitted = await processor(pictures.map((picture) => fit(picture, processor.image_processor)));
const same = { pixel_values: new Tensor("float32", Float32Array.from(job.pixels.data), job.pixels.dims) };

const found = {
  input_ids: tokens.input_ids.tolist().map((row) => row.map(Number)),
  attention_mask: tokens.attention_mask.tolist().map((row) => row.map(Number)),
  pixel_values: Array.from(own.pixel_values.data),
  fitted: Array.from(fitted.pixel_values.data),
};
for (const dtype of ["fp32", "q8"]) {
  const text = await CLIPTextModelWithProjection.from_pretrained(job.name, { dtype });
  const vision = await CLIPVisionModelWithProjection.from_pretrained(job.name, { dtype });
  const classify = await pipeline("zero-shot-image-classification", job.name, { dtype });
  found[dtype] = {
    text_embeds: (await text(tokens)).text_embeds.tolist(),
    own: (await vision(own)).image_embeds.tolist(),
    same: (await vision(same)).image_embeds.tolist(),
    fitted: (await vision(fitted)).image_embeds.tolist(),
    scores: await classify(pictures, job.labels, { hypothesis_template: "{}" }),
  };
}
console.log(JSON.stringify(found));
