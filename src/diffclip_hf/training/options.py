"""The options of `python -m diffclip_hf.train` that are its own: what is trained, and on what."""

from dataclasses import dataclass, field

from ..zero_shot_templates import IMAGENET_TEMPLATES


CONTRASTIVE, CLASSIFICATION = "contrastive", "image-classification"


@dataclass
class ModelArguments:
    """What is trained.

    Args:
        model_name_or_path: The DiffCLIP model to start from, a folder or an id on the Hub.
        model_config: For a new model with random weights: `DiffCLIPConfig`'s fields as JSON, a file with them, or a
            folder or an id on the Hub.
        tokenizer: A new model's CLIP tokenizer, a folder or an id on the Hub.
        task: `"contrastive"`, for images with captions, or `"image-classification"`, for images with labels.
        linear_probe: Whether only a classifier's last layer is trained.
        lora_rank: The rank of LoRA adapters on the attention's projections, which alone are trained; 0 for none.
        lora_alpha: Their scale, over the rank; by default twice the rank.
        lora_dropout: The dropout before them.
        teacher: For distillation, a frozen model of Transformers to learn from besides, a folder or an id on the Hub.
        attn_implementation: As in `from_pretrained`.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The DiffCLIP model to start from: a folder or an id on the Hub.", "metavar": "MODEL"},
    )
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "Start a new model with random weights: DiffCLIPConfig's fields as JSON ({} for ViT-B/16), a file "
            "with them, or a folder or an id on the Hub.",
            "metavar": "CONFIG",
        },
    )
    tokenizer: str = field(
        default="openai/clip-vit-base-patch16",
        metadata={"help": "A new model's CLIP tokenizer: a folder or an id on the Hub.", "metavar": "TOKENIZER"},
    )
    task: str = field(
        default=CONTRASTIVE,
        metadata={
            "help": "Train on images with captions (contrastive) or on images with labels (image-classification).",
            "choices": [CONTRASTIVE, CLASSIFICATION],
        },
    )
    linear_probe: bool = field(default=False, metadata={"help": "Train only a classifier's last layer."})
    lora_rank: int = field(
        default=0,
        metadata={"help": "Train only LoRA adapters of this rank, on the attention's q, k, v and out; 0 for none."},
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's scale. Twice the rank by default."})
    lora_dropout: float = field(default=0.0, metadata={"help": "The dropout before LoRA's adapters."})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Stay close to a frozen model, DiffCLIP or another CLIP of Transformers (distillation): a "
            "folder or an id on the Hub. It may be the one that is fine-tuned.",
            "metavar": "MODEL",
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "What computes attention, such as eager or sdpa; as in from_pretrained.", "metavar": "NAME"},
    )


@dataclass
class DataArguments:
    """What it is trained and evaluated on.

    Args:
        train_data: Images with captions, as `load_image_text_dataset` takes them, or with labels, as
            `load_image_label_dataset` does.
        train_split: The split of it to train on.
        eval_data, eval_split: What to evaluate on, likewise; gives the loss and recall, or accuracy.
        zero_shot_data, zero_shot_split: Images with labels, for a contrastive model's zero-shot accuracy.
        zero_shot_templates: Sentences with `{}` for the label, or `imagenet` for the 80 that go with ImageNet.
        image_column, caption_column, label_column: The columns' names, where they are unusual.
        crop_scale: The smallest and the largest share of an image's area that a random crop covers.
        global_batch_size: Samples in a step over all processes, instead of `per_device_train_batch_size`.
        shuffle_buffer, max_skipped_share, max_broken_share: As in `load_image_text_dataset`.
        pad_to_max_length: As in `ImageTextCollator`.
    """

    train_data: str | None = field(
        default=None,
        metadata={
            "help": "What to train on: tar shards, Parquet files, a folder, or a data set on the Hub.",
            "metavar": "DATA",
        },
    )
    train_split: str = field(
        default="train", metadata={"help": "The split of train_data to train on.", "metavar": "SPLIT"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "What to evaluate on; the same kinds of data as train_data.", "metavar": "DATA"},
    )
    eval_split: str = field(
        default="validation", metadata={"help": "The split of eval_data to evaluate on.", "metavar": "SPLIT"}
    )
    zero_shot_data: str | None = field(
        default=None,
        metadata={
            "help": "Images with labels, to measure a contrastive model's zero-shot accuracy at each evaluation.",
            "metavar": "DATA",
        },
    )
    zero_shot_split: str = field(
        default="validation", metadata={"help": "The split of zero_shot_data to measure.", "metavar": "SPLIT"}
    )
    zero_shot_templates: list[str] = field(
        default_factory=lambda: ["This is a photo of {}."],
        metadata={
            "help": "The sentences that the labels are put into, with {} for the label; imagenet stands for the 80 "
            "that go with ImageNet.",
            "metavar": "SENTENCE",
        },
    )
    image_column: str | None = field(
        default=None, metadata={"help": "The column that has the images, if its name is unusual.", "metavar": "NAME"}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "The column that has the captions, if its name is unusual.", "metavar": "NAME"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The column that has the labels, if its name is unusual.", "metavar": "NAME"}
    )
    crop_scale: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={
            "help": "The smallest and the largest share of an image that a random crop covers.",
            "metavar": "SHARE",
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples in a step over all processes; sets per_device_train_batch_size."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "For tar shards: how many samples each worker shuffles at a time."}
    )
    max_skipped_share: float = field(
        default=0.01, metadata={"help": "Stop if more than this share of the samples can't be used."}
    )
    max_broken_share: float = field(
        default=0.1, metadata={"help": "Stop if more than this share of the tar shards can't be read."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every caption to the model's full length, for compiled models."}
    )


def zero_shot_templates(data_args: DataArguments) -> list[str]:
    """Return the templates, ImageNet's written out."""
    templates = data_args.zero_shot_templates
    return list(IMAGENET_TEMPLATES) if templates == ["imagenet"] else templates


__all__ = ["CLASSIFICATION", "CONTRASTIVE", "DataArguments", "ModelArguments", "zero_shot_templates"]
