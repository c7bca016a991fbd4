"""The trainer's data loaders: every row in one process, in training and in evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers.trainer_utils import has_length, seed_worker

from .arguments import DiffCLIPTrainingArguments
from .shared_batches import EvenLoader, OrderedBatchSampler, SharedBatchSampler, SharedStream, collate_some, is_split


Collator = Callable[[list[Any]], Any]


class Loaders:
    """Makes loaders that accelerate doesn't divide among processes, since their batches or data sets do that.

    Args:
        args: The trainer's.
        without_columns: Returns a collator that leaves out the columns that `remove_unused_columns` says, from a
            collator and what its loader is for.
    """

    def __init__(self, args: DiffCLIPTrainingArguments, without_columns: Callable[[Collator, str], Collator]):
        self.args, self.without_columns = args, without_columns
        self.place = (args.process_index, args.world_size)

    def training(self, dataset: Any, collator: Collator, size: int, sampler: Callable[[Any], Any]) -> DataLoader:
        """Return the training data, of which every row is in one process.

        Data that is split before, as `splits_itself` or `split_dataset_by_node` says, isn't split again. The last
        batch of several processes is shared out rather than filled up, as accelerate does, with rows that were seen
        before.

        Args:
            dataset: Map-style, or a stream.
            collator: Makes the batches.
            size: Rows in a batch of one process.
            sampler: Returns the order of a map-style data set.

        Raises:
            ValueError: The data set has another `batch_size`, or too few rows.
        """
        drop_last = self.args.dataloader_drop_last
        if is_split(dataset):
            own_size = getattr(dataset, "batch_size", size)
            if own_size != size:
                raise ValueError(
                    f"{type(dataset).__name__} has batch_size {own_size}, and per_device_train_batch_size is {size}; "
                    "they must be the same."
                )
            # One that knows its length has as many whole batches in every process.
            return self._loader(
                dataset, collator, "Training", batch_size=size, drop_last=drop_last or has_length(dataset)
            )
        if isinstance(dataset, IterableDataset):
            stream = SharedStream(dataset, size, *self.place, drop_last)
            return self._loader(stream, collator, "Training", batch_size=None)
        order = sampler(dataset)
        if isinstance(order, RandomSampler):
            # As accelerate does, so that every process draws the same order.
            order = SeedableRandomSampler(order.data_source, data_seed=self.args.data_seed)
        batches = SharedBatchSampler(order, size, *self.place, drop_last)
        return self._loader(dataset, collator, "Training", batch_sampler=batches)

    def once(self, dataset: Any, collator: Collator) -> EvenLoader:
        """Return every row of a data set exactly once and in order, shared out among the processes."""
        size = self.args.eval_batch_size
        batching: dict[str, Any] = {"batch_size": None}
        source: Any = dataset
        if hasattr(dataset, "once"):
            dataset = source = dataset.once(size)
        elif is_split(dataset):
            batching = {"batch_size": size}
        elif isinstance(dataset, IterableDataset):
            source = SharedStream(dataset, size, *self.place)
        else:
            batching = {"batch_sampler": OrderedBatchSampler(len(dataset), size, *self.place)}
        return EvenLoader(self._loader(source, collator, "Evaluation", **batching), dataset, collator)

    def _loader(self, dataset: Any, collator: Collator, description: str, **batching: Any) -> DataLoader:
        args, workers = self.args, self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            collate_fn=partial(collate_some, self.without_columns(collator, description)),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            # Else those of a new epoch get the dataset as set_epoch and set_position left it.
            persistent_workers=bool(workers and args.dataloader_persistent_workers and description == "Training"),
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
            **batching,
        )


__all__ = ["Loaders"]
