"""A contrastive batch in chunks: the gradients of the whole batch, with the activations of one chunk in memory.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import get_device_states, set_device_states

from ..model.loss_diffclip import image_text_contrastive_loss
from .distillation import Loss


def _number_of_chunks(rows: torch.Tensor, chunk_size: int) -> int:
    """Return how many chunks the process with the most rows needs, so that all run the model equally often."""
    count = torch.tensor(max(1, -(-len(rows) // chunk_size)), device=rows.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def _split(inputs: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Cut the rows of each tensor into `count` parts as equal as can be; where rows are fewer, some are empty."""
    rows = len(inputs["input_ids"])
    parts = {
        name: value.tensor_split(count)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and len(value) == rows
    }
    shared = {name: value for name, value in inputs.items() if name not in parts}
    return [{**shared, **{name: part[index] for name, part in parts.items()}} for index in range(count)]


class _RandomState:
    """The state of the generators that dropout draws from, for drawing the same again."""

    def __init__(self, tensor: torch.Tensor):
        self.device_type = tensor.device.type
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(tensor)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)


def _encode(
    model: torch.nn.Module, chunks: list[dict[str, Any]]
) -> tuple[list[_RandomState], torch.Tensor, torch.Tensor]:
    """Return the generators' state before each chunk, and the embeddings of all, made without gradients."""
    states, text_embeds, image_embeds = [], [], []
    for chunk in chunks:
        states.append(_RandomState(chunk["pixel_values"]))
        with torch.no_grad():
            outputs = model(**chunk)
        text_embeds.append(outputs.text_embeds)
        image_embeds.append(outputs.image_embeds)
    return states, torch.cat(text_embeds), torch.cat(image_embeds)


def backward_in_chunks(
    model: torch.nn.Module,
    logit_scale: Callable[[], torch.Tensor],
    inputs: dict[str, Any],
    chunk_size: int,
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], AbstractContextManager],
    *,
    synchronise: bool = True,
    divisor: float = 1.0,
    loss_of: Loss = image_text_contrastive_loss,
) -> torch.Tensor:
    """Add to each parameter the gradient of a contrastive loss of the whole batch; return the loss.

    The chunks are encoded without gradients; the loss of all embeddings, those of other processes too, gives the
    gradient of each embedding; and each chunk is encoded again, with the same dropout masks, to take these gradients
    on to the parameters. So the model runs twice without gradients kept in memory for more than a chunk, and what
    grows with the batch are its inputs, its embeddings and the logits. In exact arithmetic the gradient is that of
    the whole batch at once.

    Every process of distributed training has to call this. All cut their rows into the same number of chunks, that of
    the process with the most rows, and only the backward pass of the last synchronises gradients.

    Args:
        model: A `DiffCLIPModel`, or what DDP, FSDP2, PEFT or accelerate made of it, in training mode.
        logit_scale: Returns its logit scale as it stands in the module after a forward pass.
        inputs: What `DiffCLIPModel.forward` takes, with `input_ids` and `pixel_values` of the same number of rows.
        chunk_size: The most rows that go through the model at once.
        backward: Runs the backward pass of a chunk's loss, as `Accelerator.backward`.
        no_sync: Returns a context in which gradients aren't synchronised, as `Accelerator.no_sync`.
        synchronise: Whether the last chunk synchronises gradients, as in the last step of gradient accumulation.
        divisor: What the loss is divided by, as in gradient accumulation.
        loss_of: Takes the batch's texts, images and logit scale, as `image_text_contrastive_loss` does.

    Returns:
        The local loss over `divisor`, detached, without dimensions.

    Raises:
        ValueError: The numbers of texts and images differ.
    """
    count = _number_of_chunks(inputs["input_ids"], chunk_size)
    chunks = _split({**inputs, "return_loss": False, "return_dict": True}, count)
    states, text_embeds, image_embeds = _encode(model, chunks)
    leaves = [text_embeds, image_embeds, logit_scale().detach().clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = loss_of(*leaves) / divisor
    text_gradient, image_gradient, scale_gradient = torch.autograd.grad(loss, leaves)
    gradients = zip(text_gradient.tensor_split(count), image_gradient.tensor_split(count), strict=True)

    for index, (chunk, state, (text_part, image_part)) in enumerate(zip(chunks, states, gradients, strict=True)):
        last = synchronise and index == count - 1
        state.restore()
        with nullcontext() if last else no_sync():
            outputs = model(**chunk)
            # Its gradient is the cached one. The scale's has a part in each chunk, so that every parameter has one,
            # which DDP waits for.
            backward(
                (outputs.text_embeds * text_part).sum()
                + (outputs.image_embeds * image_part).sum()
                + (logit_scale() * scale_gradient / count).sum()
            )
    return loss.detach()
