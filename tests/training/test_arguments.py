"""The trainer's arguments: what would have no effect is refused."""

import pytest
from pairs import Pairs, arguments, classifier, collate
from tiny import tiny_model

from diffclip_hf.training import DiffCLIPTrainer


def refused(model, args, given: dict) -> None:
    """The last of what is given has to be named."""
    name, value = list(given.items())[-1]
    name = next(iter(value)) if isinstance(value, dict) else name
    with pytest.raises(ValueError, match=f"^{name}.* is given, but .*; leave it out"):
        DiffCLIPTrainer(model, args)


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing_factor": 0.1},
        {"include_for_metrics": ["loss"]},
        {"prediction_loss_only": True},
        {"label_names": ["targets"]},
        {"dataloader_persistent_workers": True},
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
        {"use_cache": True},
        {"eval_use_gather_object": True},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}},
        {"contrastive_chunk_size": 2, "torch_empty_cache_steps": 1},
        {"contrastive_chunk_size": 2, "optim": "lomo"},
    ],
)
def test_arguments_without_effect_are_refused(given, tmp_path):
    refused(tiny_model(), arguments(tmp_path, **given), given)


@pytest.mark.parametrize("given", [{"label_names": ["targets"]}, {"contrastive_chunk_size": 2}])
def test_arguments_without_effect_on_a_classifier_are_refused(given, tmp_path):
    refused(classifier(), arguments(tmp_path, **given), given)


@pytest.mark.parametrize("sharing", [{"use_seedable_sampler": False}, {"non_blocking": True}])
def test_arguments_without_effect_on_several_processes_are_refused(sharing, tmp_path, monkeypatch):
    given = {"accelerator_config": sharing}
    args = arguments(tmp_path, **given)
    DiffCLIPTrainer(tiny_model(), args)
    monkeypatch.setattr(type(args), "world_size", 2)
    refused(tiny_model(), args, given)


@pytest.mark.parametrize("given", [{"neftune_noise_alpha": 5.0}, {"include_num_input_tokens_seen": "all"}])
def test_arguments_about_texts_are_for_models_of_texts(given, tmp_path):
    with pytest.raises(ValueError, match="is given, but DiffCLIPForImageClassification"):
        DiffCLIPTrainer(classifier(), arguments(tmp_path, **given))
    DiffCLIPTrainer(
        tiny_model(), arguments(tmp_path, max_steps=1, **given), data_collator=collate, train_dataset=Pairs()
    ).train()
