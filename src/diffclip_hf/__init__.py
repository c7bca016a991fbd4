"""DiffCLIP for Hugging Face Transformers.

Importing the package registers its classes with Transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from .common.remote_code import add_remote_code
from .model.attention_diffclip import differential_attention_map
from .model.configuration_diffclip import DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig
from .model.image_processing_diffclip import DiffCLIPImageProcessor, DiffCLIPImageProcessorPil
from .model.modeling_diffclip import (
    DiffCLIPForImageClassification,
    DiffCLIPModel,
    DiffCLIPPreTrainedModel,
    DiffCLIPTextModel,
    DiffCLIPTextModelWithProjection,
    DiffCLIPVisionModel,
    DiffCLIPVisionModelWithProjection,
)
from .model.processing_diffclip import DiffCLIPProcessor, DiffCLIPTokenizer
from .search.index import ImageIndex
from .version import __version__
from .zero_shot import ZeroShotClassifier
from .zero_shot_templates import IMAGENET_TEMPLATES, IMAGENET_TEMPLATES_SMALL


for _config_class in (DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig):
    AutoConfig.register(_config_class.model_type, _config_class)
AutoModel.register(DiffCLIPConfig, DiffCLIPModel)
AutoModel.register(DiffCLIPTextConfig, DiffCLIPTextModel)
AutoModel.register(DiffCLIPVisionConfig, DiffCLIPVisionModel)
AutoModelForZeroShotImageClassification.register(DiffCLIPConfig, DiffCLIPModel)
AutoModelForImageClassification.register(DiffCLIPConfig, DiffCLIPForImageClassification)
AutoImageProcessor.register(
    DiffCLIPConfig,
    image_processor_classes={"torchvision": DiffCLIPImageProcessor, "pil": DiffCLIPImageProcessorPil},
)
AutoTokenizer.register(DiffCLIPConfig, fast_tokenizer_class=DiffCLIPTokenizer)
AutoProcessor.register(DiffCLIPConfig, DiffCLIPProcessor)

__all__ = [
    "DiffCLIPConfig",
    "DiffCLIPForImageClassification",
    "DiffCLIPImageProcessor",
    "DiffCLIPImageProcessorPil",
    "DiffCLIPModel",
    "DiffCLIPPreTrainedModel",
    "DiffCLIPProcessor",
    "DiffCLIPTextConfig",
    "DiffCLIPTextModel",
    "DiffCLIPTextModelWithProjection",
    "DiffCLIPTokenizer",
    "DiffCLIPVisionConfig",
    "DiffCLIPVisionModel",
    "DiffCLIPVisionModelWithProjection",
    "IMAGENET_TEMPLATES",
    "IMAGENET_TEMPLATES_SMALL",
    "ImageIndex",
    "ZeroShotClassifier",
    "__version__",
    "add_remote_code",
    "differential_attention_map",
]
