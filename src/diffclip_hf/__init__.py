"""DiffCLIP for Hugging Face Transformers.

Importing the package registers its classes with Transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
)

from .attention_diffclip import differential_attention_map
from .configuration_diffclip import DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig
from .modeling_diffclip import (
    DiffCLIPForImageClassification,
    DiffCLIPModel,
    DiffCLIPPreTrainedModel,
    DiffCLIPTextModel,
    DiffCLIPTextModelWithProjection,
    DiffCLIPVisionModel,
    DiffCLIPVisionModelWithProjection,
)


__version__ = "0.1.0"

for _config_class in (DiffCLIPConfig, DiffCLIPTextConfig, DiffCLIPVisionConfig):
    AutoConfig.register(_config_class.model_type, _config_class)
AutoModel.register(DiffCLIPConfig, DiffCLIPModel)
AutoModel.register(DiffCLIPTextConfig, DiffCLIPTextModel)
AutoModel.register(DiffCLIPVisionConfig, DiffCLIPVisionModel)
AutoModelForZeroShotImageClassification.register(DiffCLIPConfig, DiffCLIPModel)
AutoModelForImageClassification.register(DiffCLIPConfig, DiffCLIPForImageClassification)

__all__ = [
    "DiffCLIPConfig",
    "DiffCLIPForImageClassification",
    "DiffCLIPModel",
    "DiffCLIPPreTrainedModel",
    "DiffCLIPTextConfig",
    "DiffCLIPTextModel",
    "DiffCLIPTextModelWithProjection",
    "DiffCLIPVisionConfig",
    "DiffCLIPVisionModel",
    "DiffCLIPVisionModelWithProjection",
    "differential_attention_map",
]
