"""PyTorch DiffCLIP: CLIP with differential attention, with the API of Transformers' CLIP.

The blocks are in `layers_diffclip`, the formula in `attention_diffclip`.
"""

import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .calls_diffclip import (
    attention_mask_of,
    call_implementation,
    end_of_text,
    start_of_text,
    take_is_causal,
    tower_kwargs,
)
from .configuration_diffclip import DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig
from .hub_cache_diffclip import checked_downloads
from .initialisation_diffclip import initialise, note_initial_stds
from .inputs_diffclip import (
    check_input_ids,
    check_keyword_arguments,
    check_labels,
    check_pixel_values,
    check_text_companion,
)
from .layers_diffclip import (
    DiffCLIPAttention,
    DiffCLIPDifferentialAttention,
    DiffCLIPEncoder,
    DiffCLIPEncoderLayer,
    DiffCLIPTextEmbeddings,
    DiffCLIPVisionEmbeddings,
)
from .loss_diffclip import image_text_contrastive_loss
from .offloading_diffclip import check_four_bit_widths, check_has_weights, execution_device
from .outputs_diffclip import DiffCLIPOutput, DiffCLIPTextModelOutput, DiffCLIPVisionModelOutput


_Model = TypeVar("_Model", bound="DiffCLIPPreTrainedModel")


class DiffCLIPPreTrainedModel(PreTrainedModel):
    """Base of every DiffCLIP model: loading, saving and initialisation."""

    config: DiffCLIPConfig
    config_class = DiffCLIPConfig
    base_model_prefix = "diffclip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # No loss here is divided by a `num_items_in_batch`, which Transformers' Trainer would else conclude from **kwargs.
    accepts_loss_kwargs = False
    _no_split_modules = ["DiffCLIPTextEmbeddings", "DiffCLIPVisionEmbeddings", "DiffCLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # exp magnifies the rounding of λ's vectors, which the original keeps in float32 under autocast.
    _keep_in_fp32_modules_strict = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]
    _can_record_outputs = {"hidden_states": DiffCLIPEncoderLayer, "attentions": DiffCLIPAttention}

    @classmethod
    def _checked(cls, config: Any) -> Any:
        """Return the configuration that a model is made of, or raise a ValueError where it can't be.

        Its fields are looked at again, since they may have been set after it was made.
        """
        expected = cls.config_class
        given = getattr(config, "model_type", None)
        if given != expected.model_type:
            raise ValueError(
                f"{cls.__name__} is given a {type(config).__name__}, of a model of type {given!r}; it must be a "
                f"{expected.__name__}."
            )
        config.validate_architecture()
        return config

    @property
    def device(self) -> torch.device:
        """The device on which the model computes and takes inputs, also where its weights are offloaded."""
        return execution_device(self)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> _Model:
        """Load a model as Transformers does, and check the weights that it fetches from the Hub against their hash.

        Raises:
            OSError: As Transformers does, and where fetched weights aren't those that the Hub announced; they are
                removed from the cache.
            ValueError: A quantised layer is of a size that its library can't compute.
        """
        with checked_downloads(str(pretrained_model_name_or_path), cache_dir):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, cache_dir=cache_dir, **kwargs)
        # With output_loading_info it is a pair.
        check_four_bit_widths(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def post_init(self) -> None:
        """Initialise the weights and what Transformers keeps of a model."""
        note_initial_stds(self)
        super().post_init()
        # Transformers adds each tower's patterns to the whole model's, where they would hide unexpected keys.
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    # trf-ignore: TRF018 (Transformers' defaults are other distributions, and every kind of module here is named)
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module from the original's distributions, `initialisation_diffclip.initial_stds`."""
        # A tower initialises its own modules, so the configuration is a tower's there and the whole model's elsewhere.
        initialise(module, self.config)

    def _check_has_values(self, given: torch.Tensor) -> None:
        """Raise a ValueError where a tower on the meta device is given numbers; hooks bring offloaded weights."""
        if not given.is_meta and self.get_input_embeddings().weight.is_meta:
            check_has_weights(self)


class DiffCLIPTextModel(DiffCLIPPreTrainedModel):
    """DiffCLIP's text tower without the projection."""

    config: DiffCLIPTextConfig
    config_class = DiffCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"
    # What a whole model's folder holds besides this tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^text_projection\.",
        "^logit_scale$",
    ]

    def __init__(self, config: DiffCLIPTextConfig):
        super().__init__(self._checked(config))
        self.embeddings = DiffCLIPTextEmbeddings(config)
        self.encoder = DiffCLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Padding, left or right, changes no embedding: positions count from a text's first token, and the first
        end-of-text token is pooled.

        Args:
            input_ids: Token ids, (batch, tokens), at most `config.max_position_embeddings` tokens, each row with an
                end-of-text token.
            attention_mask: 1 for tokens to attend to, 0 for padding, (batch, tokens). Without one, what stands before
                a row's start token (`config.bos_token_id`) counts as padding.
            position_ids: Positions, (batch, tokens), if not counted from the first token.
            **kwargs: Transformers' own: `output_attentions`, which is slower; `output_hidden_states`, True or the
                indices of some; `return_dict`; `is_causal`, False for attention in both directions; and more.

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size) after the final LayerNorm, and `pooler_output` (batch,
            hidden_size), its end-of-text token.

        Raises:
            ValueError: `input_ids` is missing, not of integers or too long, an id isn't in the vocabulary, or a row
                has no end-of-text token.
            TypeError: An argument isn't a tensor, or is unknown.
        """
        check_keyword_arguments(DiffCLIPTextModel.forward, kwargs)
        input_ids = check_input_ids(input_ids, self.config.max_position_embeddings)
        check_text_companion("attention_mask", attention_mask, input_ids)
        check_text_companion("position_ids", position_ids, input_ids, self.config.max_position_embeddings - 1)
        self._check_has_values(input_ids)
        implementation = call_implementation(self.config, input_ids, kwargs)
        is_causal = take_is_causal(self.config, kwargs, default=True)
        length = input_ids.shape[-1]
        input_ids = input_ids.view(-1, length)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(-1, length)

        start = start_of_text(input_ids, attention_mask, self.config.bos_token_id)
        vocab_size = getattr(self.get_input_embeddings(), "num_embeddings", self.config.vocab_size)
        end = end_of_text(input_ids, start, self.config.eos_token_id, vocab_size)
        token_idx = torch.arange(length, device=input_ids.device)[None]
        if position_ids is None:
            position_ids = token_idx if start is None else (token_idx - start).clamp(min=0)
        if attention_mask is None:
            attention_mask = None if start is None else (token_idx >= start).long()
        elif attention_mask.ndim == 2:
            # A mask made by `input_ids != pad_token_id` hides the end of text where both have one id.
            attention_mask = attention_mask.bool().logical_or(token_idx == end).long()

        hidden_states = self.embeddings(input_ids, position_ids)
        mask = attention_mask_of(hidden_states, attention_mask, implementation, is_causal)
        hidden_states = self.encoder(
            hidden_states, mask, attn_implementation=implementation, is_causal=is_causal, **kwargs
        )

        last_hidden_state = self.final_layer_norm(hidden_states)
        batch_idx = torch.arange(input_ids.shape[0], device=last_hidden_state.device)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[batch_idx, end.flatten().to(last_hidden_state.device)],
        )


class DiffCLIPVisionModel(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower without the projection."""

    config: DiffCLIPVisionConfig
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    # What a whole model's folder holds besides this tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.",
        r"^visual_projection\.",
        r"^text_projection\.",
        "^logit_scale$",
    ]

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__(self._checked(config))
        self.embeddings = DiffCLIPVisionEmbeddings(config)
        width, eps = config.hidden_size, config.layer_norm_eps
        # CODEPATH: OpenAI's CLIP and its kin have this norm; the paper's models, CLIP too, are SLIP's, and have none.
        self.pre_layernorm = nn.LayerNorm(width, eps=eps) if config.pre_layernorm else nn.Identity()
        self.encoder = DiffCLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: Images as the image processor makes them, (batch, channels, height, width).
            interpolate_pos_encoding: Whether to accept another size than `config.image_size`, by interpolating the
                position embeddings.
            **kwargs: As in `DiffCLIPTextModel.forward`; `is_causal` is False here.

        Returns:
            `last_hidden_state` (batch, 1 + patches, hidden_size) after the final LayerNorm, and `pooler_output`
            (batch, hidden_size), its class token.

        Raises:
            ValueError: `pixel_values` is missing, not of floating-point numbers, not (batch, channels, height, width),
                or of another size or number of channels than the configuration's.
            TypeError: `pixel_values` isn't a tensor, or an argument is unknown.
        """
        check_keyword_arguments(DiffCLIPVisionModel.forward, kwargs)
        pixel_values = check_pixel_values(pixel_values, self.config.num_channels)
        self._check_has_values(pixel_values)
        implementation = call_implementation(self.config, pixel_values, kwargs)
        is_causal = take_is_causal(self.config, kwargs, default=False)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.pre_layernorm(hidden_states)
        mask = attention_mask_of(hidden_states, None, implementation, is_causal) if is_causal else None
        hidden_states = self.encoder(
            hidden_states, mask, attn_implementation=implementation, is_causal=is_causal, **kwargs
        )
        last_hidden_state = self.post_layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=last_hidden_state[:, 0])


class DiffCLIPModel(DiffCLIPPreTrainedModel):
    """DiffCLIP: both towers, their projections and the logit scale.

    Source: paper arXiv 2503.06626; Radford et al. 2021 (CLIP).
    """

    def __init__(self, config: DiffCLIPConfig):
        super().__init__(self._checked(config))
        self.text_model = DiffCLIPTextModel._from_config(config.text_config)
        self.vision_model = DiffCLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts into the shared space.

        The arguments and errors are those of `DiffCLIPTextModel.forward`.

        Returns:
            The text tower's output, with `pooler_output` the projected embedding, not normalised, (batch,
            projection_dim).
        """
        check_keyword_arguments(DiffCLIPModel.get_text_features, kwargs)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **tower_kwargs(self.config, kwargs),
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images into the shared space.

        The arguments and errors are those of `DiffCLIPVisionModel.forward`.

        Returns:
            The image tower's output, with `pooler_output` the projected embedding, not normalised, (batch,
            projection_dim).
        """
        check_keyword_arguments(DiffCLIPModel.get_image_features, kwargs)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **tower_kwargs(self.config, kwargs),
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return texts' L2-normalised embeddings, (batch, projection_dim); the arguments of `get_text_features`."""
        features = self.get_text_features(input_ids, attention_mask, position_ids, return_dict=True).pooler_output
        return nn.functional.normalize(features, dim=-1)

    def encode_image(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Return images' L2-normalised embeddings, (batch, projection_dim); the arguments of `get_image_features`."""
        features = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True).pooler_output
        return nn.functional.normalize(features, dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> DiffCLIPOutput:
        """Compare images with texts.

        Args:
            input_ids: Token ids, (texts, tokens); left out, only the images are encoded.
            pixel_values: Images, (images, channels, height, width); left out, only the texts are encoded.
            attention_mask, position_ids: As in `DiffCLIPTextModel.forward`.
            return_loss: Whether to compute the contrastive loss, for which image i belongs to text i, and which every
                process of distributed training has to compute: its negatives come from all of them.
            interpolate_pos_encoding: As in `DiffCLIPVisionModel.forward`.

        Returns:
            A `DiffCLIPOutput`; without one of the modalities, its fields and the logits are None.

        Raises:
            ValueError: Both modalities are missing, or one is and a loss is asked for; and as the towers raise.
        """
        check_keyword_arguments(DiffCLIPModel.forward, kwargs)
        if input_ids is None and pixel_values is None:
            raise ValueError("input_ids and pixel_values are both None; at least one must be given.")
        if return_loss and (input_ids is None or pixel_values is None):
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(f"return_loss is True, but {missing} is None; the loss needs images and texts.")

        vision_outputs = text_outputs = image_embeds = text_embeds = None
        if pixel_values is not None:
            vision_outputs = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )
            image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        if input_ids is not None:
            text_outputs = self.get_text_features(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
            )
            text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)

        logits_per_text = logits_per_image = loss = None
        if image_embeds is not None and text_embeds is not None:
            # With device_map the towers may end on different devices.
            scale = self.logit_scale.exp().to(text_embeds.device)
            logits_per_text = scale * text_embeds @ image_embeds.t().to(text_embeds.device)
            logits_per_image = logits_per_text.t()
            if return_loss:
                loss = image_text_contrastive_loss(text_embeds, image_embeds, self.logit_scale)

        return DiffCLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )


class DiffCLIPTextModelWithProjection(DiffCLIPPreTrainedModel):
    """DiffCLIP's text tower with the projection into the shared space."""

    config: DiffCLIPTextConfig
    config_class = DiffCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPTextConfig):
        super().__init__(self._checked(config))
        self.text_model = DiffCLIPTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DiffCLIPTextModelOutput:
        """Encode texts; the arguments and errors are those of `DiffCLIPTextModel.forward`.

        Returns:
            A `DiffCLIPTextModelOutput`, with `text_embeds` not normalised, (batch, projection_dim).
        """
        check_keyword_arguments(DiffCLIPTextModelWithProjection.forward, kwargs)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        return DiffCLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DiffCLIPVisionModelWithProjection(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower with the projection into the shared space."""

    config: DiffCLIPVisionConfig
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPVisionConfig):
        super().__init__(self._checked(config))
        self.vision_model = DiffCLIPVisionModel._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> DiffCLIPVisionModelOutput:
        """Encode images; the arguments and errors are those of `DiffCLIPVisionModel.forward`.

        Returns:
            A `DiffCLIPVisionModelOutput`, with `image_embeds` not normalised, (batch, projection_dim).
        """
        check_keyword_arguments(DiffCLIPVisionModelWithProjection.forward, kwargs)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        return DiffCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DiffCLIPForImageClassification(DiffCLIPPreTrainedModel):
    """DiffCLIP's image tower with a linear classifier on the mean of the patch tokens."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(text|visual)_projection\.", "^logit_scale$"]

    def __init__(self, config: DiffCLIPConfig):
        super().__init__(self._checked(config))
        self.num_labels: int = config.num_labels or 0
        self.vision_model = DiffCLIPVisionModel._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        self.classifier = nn.Linear(width, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embedding."""
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embedding."""
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values, interpolate_pos_encoding: As in `DiffCLIPVisionModel.forward`.
            labels: Class indices, (batch,), or what `config.problem_type` asks for.

        Returns:
            An `ImageClassifierOutput`, with `logits` (batch, num_labels) and, with labels, the loss.
        """
        check_keyword_arguments(DiffCLIPForImageClassification.forward, kwargs)
        if labels is not None and isinstance(pixel_values, torch.Tensor):
            check_labels(labels, len(pixel_values), self.num_labels)
        outputs = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **tower_kwargs(self.config, kwargs),
        )
        logits = self.classifier(outputs.last_hidden_state[:, 1:].mean(dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "DiffCLIPDifferentialAttention",
    "DiffCLIPForImageClassification",
    "DiffCLIPModel",
    "DiffCLIPOutput",
    "DiffCLIPPreTrainedModel",
    "DiffCLIPTextModel",
    "DiffCLIPTextModelOutput",
    "DiffCLIPTextModelWithProjection",
    "DiffCLIPVisionModel",
    "DiffCLIPVisionModelOutput",
    "DiffCLIPVisionModelWithProjection",
]
