"""A model's towers as graphs of ONNX: exported, with int8 weights, joined to one graph, and run."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .model.configuration_diffclip import DiffCLIPTextConfig, DiffCLIPVisionConfig
from .model.modeling_diffclip import DiffCLIPModel


BATCHES = (1, 3)
LENGTHS = (7, 77)
TIMED_BATCHES = (1, 8)
OPSETS = range(18, 24)
DEFAULT_OPSET = 20
# What one protobuf file may hold, less some room for the graph itself.
MAX_BYTES = 2**31 - 2**24
Inputs = dict[str, torch.Tensor]
# What computes embeddings, (batch, projection_dim), in PyTorch or ONNX Runtime.
Runner = Callable[[Inputs], np.ndarray]


class ExportError(ValueError):
    """The export can't be done, or a check of it failed."""


class VisionTower(nn.Module):
    """The image tower with its projection, as one function of tensors."""

    def __init__(self, model: DiffCLIPModel):
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return (batch, projection_dim), not normalised, of (batch, channels, image_size, image_size)."""
        return self.visual_projection(self.vision_model(pixel_values, return_dict=True).pooler_output)


class TextTower(nn.Module):
    """The text tower with its projection, as one function of tensors."""

    def __init__(self, model: DiffCLIPModel):
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection
        eos = model.text_model.config.eos_token_id
        self.ends = eos if isinstance(eos, list) else [eos]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return (batch, projection_dim), not normalised, of token ids and their mask, (batch, tokens), int64."""
        is_end = torch.stack([input_ids == end for end in self.ends]).any(0)
        is_last = torch.arange(input_ids.shape[1]) == input_ids.shape[1] - 1
        # transformers.js cuts a long text's end-of-text token off.
        was_cut = is_end.int().amax(-1, keepdim=True) == 0
        input_ids = torch.where(was_cut & is_last, self.ends[0], input_ids)
        return self.text_projection(self.text_model(input_ids, attention_mask, return_dict=True).pooler_output)


def image_inputs(config: DiffCLIPVisionConfig, batch: int, seed: int = 0, smooth: bool = False) -> Inputs:
    """Return random images, float32 with standard deviation near 1, as an image processor's are.

    Args:
        config: The image tower's.
        batch: How many images.
        seed: Of the random numbers.
        smooth: Whether neighbouring pixels are alike, as in pictures; otherwise every pixel is noise of its own.

    Returns:
        `pixel_values`, (batch, channels, image_size, image_size).
    """
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    if not smooth:
        return {"pixel_values": torch.randn(batch, config.num_channels, side, side, generator=generator)}
    coarse = torch.randn(batch, config.num_channels, 5, 5, generator=generator)
    return {"pixel_values": nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")}


def text_inputs(config: DiffCLIPTextConfig, batch: int, length: int, padding: str = "right", seed: int = 0) -> Inputs:
    """Return random texts, the first of `length` tokens and each other one shorter by one, padded on one side.

    Args:
        config: The text tower's.
        batch: How many texts.
        length: Tokens a row, 3 or more.
        padding: `"right"` or `"left"`.
        seed: Of the random numbers.

    Returns:
        `input_ids` and `attention_mask`, (batch, length), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    special = {config.bos_token_id, config.pad_token_id}
    special |= set(config.eos_token_id) if isinstance(config.eos_token_id, list) else {eos}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    input_ids = torch.full((batch, length), pad)
    attention_mask = torch.zeros(batch, length, dtype=torch.long)
    for row in range(batch):
        tokens = max(length - row, 3)
        place = slice(0, tokens) if padding == "right" else slice(length - tokens, length)
        text = words[torch.randint(len(words), (tokens,), generator=generator)]
        if config.bos_token_id is not None:
            text[0] = config.bos_token_id
        text[-1] = eos
        input_ids[row, place] = text
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@dataclass(frozen=True)
class Tower:
    """A tower, and with what it is exported and checked.

    Args:
        name: Of its files, without ".onnx".
        module: Of the model in float32, in evaluation mode, under eager attention.
        output: Name of the graph's output.
        dynamic_shapes: Input → dimension → name of what may vary.
        checks: Name of a check → inputs, at every batch and length that the graph has to serve.
        samples: Inputs for the similarity of int8 to float32.
        timed: Batch → inputs of full length.
    """

    name: str
    module: nn.Module
    output: str
    dynamic_shapes: dict[str, dict[int, Any]]
    checks: dict[str, Inputs]
    samples: list[Inputs]
    timed: dict[int, Inputs]

    @torch.inference_mode()
    def __call__(self, inputs: Inputs) -> np.ndarray:
        """Return PyTorch's embeddings, (batch, projection_dim)."""
        return self.module(**inputs).numpy()


def towers_of(model: DiffCLIPModel) -> list[Tower]:
    """Return a model's two towers."""
    vision, text = model.vision_model.config, model.text_model.config
    context = text.max_position_embeddings
    # The two names are the same dimensions in both inputs of the text tower.
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=context)
    lengths = sorted({min(length, context) for length in LENGTHS})
    return [
        Tower(
            name="vision_model",
            module=VisionTower(model),
            output="image_embeds",
            dynamic_shapes={"pixel_values": {0: batch}},
            checks={f"batch {size}": image_inputs(vision, size) for size in BATCHES},
            samples=[image_inputs(vision, 8, seed=1), image_inputs(vision, 8, seed=2, smooth=True)],
            timed={size: image_inputs(vision, size, seed=3) for size in TIMED_BATCHES},
        ),
        Tower(
            name="text_model",
            module=TextTower(model),
            output="text_embeds",
            dynamic_shapes={name: {0: batch, 1: sequence} for name in ("input_ids", "attention_mask")},
            checks={
                f"batch {size}, length {length}, {side} padding": text_inputs(text, size, length, side)
                for size in BATCHES
                for length in lengths
                for side in ("right", "left")
            },
            samples=[text_inputs(text, 16, length, seed=1) for length in lengths],
            timed={size: text_inputs(text, size, context, seed=2) for size in TIMED_BATCHES},
        ),
    ]


def export_tower(tower: Tower, path: Path, opset: int = DEFAULT_OPSET) -> None:
    """Write a tower as one ONNX file, its weights in it, λ folded to a constant and no path of this machine in it.

    Args:
        tower: What `towers_of` returned.
        path: Of the file.
        opset: Of ONNX's operators.

    Raises:
        ExportError: The tower is too large for one file.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    size = sum(tensor.nbytes for tensor in tower.module.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(f"{tower.name} has {size} bytes of weights; one ONNX file holds at most {MAX_BYTES}.")
    # Of another batch and length than what is checked. Not of 1, which torch.export would take for a constant.
    inputs = {name: tensor[:2] for name, tensor in next(reversed(tower.checks.values())).items()}
    with warnings.catch_warnings(), torch.no_grad():
        # input_ids and attention_mask share their dimensions' names, as they should.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        # torch 2.13's own, fixed in 2.14.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.export.export(tower.module, (), kwargs=inputs, dynamic_shapes=tower.dynamic_shapes)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=tower.dynamic_shapes,
            input_names=list(inputs),
            output_names=[tower.output],
            verbose=False,
        )
    assert onnx_program is not None
    # Each node has a stack trace, with the paths of the code that made it.
    ClearMetadataAndDocStringPass()(onnx_program.model)
    onnx_program.save(path, external_data=False)


def quantize_tower(path: Path, quantized: Path) -> None:
    """Write the int8 version of a graph: weights of the matrix products, per channel; activations at run time.

    The patch convolution, the embedding tables and the first block's query and key stay float32. Weights have 7 bits:
    with 8, a processor without VNNI overflows the 16-bit sums of two products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = quantized.with_suffix(".prepared")
    # onnx's shape inference alone: ONNX Runtime optimises the graph when it loads it.
    quant_pre_process(path, prepared, skip_optimization=True, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    prepared.unlink()
    # Of the products that it transposes, ONNX Runtime 1.23 would take the old shapes to be contradictions.
    del model.graph.value_info[:]
    weights = {weight.name for weight in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    quantize_dynamic(
        model,
        quantized,
        op_types_to_quantize=["MatMul", "Gemm"],
        # In the order of the graph, the first are the first block's query and key. Where A1·v and λ·A2·v nearly
        # cancel, the RMSNorm behind them magnifies an error of the maps: of the embedded model's texts of three tokens
        # some fall to a similarity of 0.986 with int8 here, and to 0.998 without.
        nodes_to_exclude=products[:2],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def join_towers(vision: Path, text: Path, scale: float, joint: Path) -> None:
    """Write both towers as one graph, with the outputs of `DiffCLIPModel`: logits, and normalised embeddings.

    Args:
        vision, text: The towers' graphs, both in float32 or both with int8 weights.
        scale: Of cosine similarities to logits, exp(logit_scale).
        joint: The file to write.

    Raises:
        ExportError: The towers are too large for one file.
    """
    import onnx
    from onnx import compose, helper, numpy_helper

    size = vision.stat().st_size + text.stat().st_size
    if size > MAX_BYTES:
        raise ExportError(
            f"{joint.name} would have {size} bytes; one ONNX file holds at most {MAX_BYTES}. Pass --no-joint to "
            "export the towers alone."
        )
    towers, outputs = [], []
    for name, path in (("image", vision), ("text", text)):
        tower = onnx.load(path)
        # There may be other numbers of images than of texts.
        for value in (*tower.graph.input, *tower.graph.output, *tower.graph.value_info):
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param == "batch":
                    dimension.dim_param = f"{name}_batch"
        outputs += tower.graph.output
        # For both towers name their nodes alike; the output becomes `image/image_embeds`.
        towers.append(compose.add_prefix(tower, f"{name}/", rename_inputs=False))
    image_tower, text_tower = towers
    model = compose.merge_models(image_tower, text_tower, io_map=[])
    nodes = [
        *(
            helper.make_node("LpNormalization", [f"{name}/{name}_embeds"], [f"{name}_embeds"], axis=-1, p=2)
            for name in ("image", "text")
        ),
        helper.make_node("Transpose", ["image_embeds"], ["image_columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["text_embeds", "image_columns"], ["similarities"]),
        helper.make_node("Mul", ["similarities", "scale"], ["logits_per_text"]),
        helper.make_node("Transpose", ["logits_per_text"], ["logits_per_image"], perm=[1, 0]),
    ]
    images, texts = (output.type.tensor_type.shape.dim[0].dim_param for output in outputs)
    logits = [
        helper.make_tensor_value_info("logits_per_image", onnx.TensorProto.FLOAT, [images, texts]),
        helper.make_tensor_value_info("logits_per_text", onnx.TensorProto.FLOAT, [texts, images]),
    ]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale, dtype=np.float32), "scale"))
    del model.graph.output[:]
    model.graph.output.extend([*logits, *outputs])
    onnx.save(model, joint)


def open_graph(path: Path) -> Runner:
    """Return a function that runs a graph on the CPU, with as many threads as PyTorch's: inputs → its first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a run would slow what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


__all__ = [
    "DEFAULT_OPSET",
    "OPSETS",
    "ExportError",
    "Inputs",
    "Runner",
    "Tower",
    "export_tower",
    "join_towers",
    "open_graph",
    "quantize_tower",
    "towers_of",
]
