"""PyTorch datasets, map-style and as a stream: over workers and ranks, stopped and resumed."""

import random
from collections import Counter
from itertools import chain, islice

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision.transforms import v2

import notbugs

MORE = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # workers than there are processors


def label_at(dataset, split):
    rows = dataset.table.filter(dataset.table["split"].to_numpy() == split)
    return rows["label"].to_pylist()


def test_a_map_style_dataset_is_trained_on_by_a_plain_loop(opened):
    examples = notbugs.open("clean", store=opened[0]).torch("train")
    images, labels = next(iter(DataLoader(examples, batch_size=64, shuffle=False)))
    assert images.shape == (64, 1, 8, 8) and images.dtype == torch.float32 and 0 <= images.min() < images.max() <= 1
    assert labels.tolist() == examples.targets[:64] == label_at(examples.dataset, "train")[:64]
    assert len(examples) == 192 and examples.classes[3] == "3"


def test_a_transform_is_given_a_pil_image_as_by_torchvision(opened):
    dataset = notbugs.open("clean", store=opened[0])
    made = v2.Compose([v2.Resize(16), v2.PILToTensor()])
    assert dataset.torch("test", transform=made)[0][0].shape == (1, 16, 16)
    assert next(iter(dataset.stream("test", transform=made)))[0].shape == (1, 16, 16)


class Key:
    """An object that identifies an image in its place."""

    def __call__(self, image):
        return hash(image.tobytes()) % 2**60


def keys_of(loader):
    return [int(key) for keys, _ in loader for key in keys]


def test_a_stream_gives_every_sample_once_in_an_order_of_its_seed_and_epoch(opened):
    dataset = notbugs.open("clean", store=opened[0])
    in_order = [key for key, _ in dataset.stream("train", Key(), shuffle=False)]
    assert in_order == [Key()(image) for image, _ in dataset.torch("train", transform=lambda image: image)]
    stream = dataset.stream("train", Key(), seed=1)
    first, second = ([key for key, _ in stream] for _ in range(2))
    assert Counter(first) == Counter(second) == Counter(in_order)
    assert first != second != in_order
    again = dataset.stream("train", Key(), seed=1)
    again.set_epoch(1)
    assert [key for key, _ in again] == second
    assert [key for key, _ in dataset.stream("train", Key(), seed=2)] != first


@MORE
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 3), (5, 0)])
def test_over_ranks_and_workers_every_sample_comes_once(world, workers, opened):
    dataset = notbugs.open("clean", store=opened[0])
    streams = [dataset.stream("train", Key(), rank=rank, world=world) for rank in range(world)]
    found = [keys_of(DataLoader(stream, batch_size=7, num_workers=workers)) for stream in streams]
    expected = [key for key, _ in dataset.stream("train", Key(), shuffle=False)]
    assert Counter(chain(*found)) == Counter(expected)
    sizes = [len(each) for each in found]
    assert sizes == [len(stream) for stream in streams] and max(sizes) - min(sizes) <= max(1, workers)


def test_an_epoch_that_was_stopped_anywhere_goes_on_with_the_samples_that_are_left(opened):
    dataset, draw = notbugs.open("clean", store=opened[0]), random.Random(0)
    whole, left = list(dataset.stream("train", Key(), seed=4)), dataset.stream("train", Key(), seed=4)
    found = []
    while len(found) < len(whole):
        state = left.state_dict() if found else None
        left = dataset.stream("train", Key(), seed=4)
        if state:
            left.load_state_dict(state)
        found += islice(left, draw.randint(1, 70))
    assert found == whole


@MORE
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # of torchdata
def test_three_workers_on_two_ranks_stopped_and_continued_give_each_sample_once(opened):
    dataset, draw, found = notbugs.open("clean", store=opened[0]), random.Random(1), []
    for rank in range(2):

        def loader(rank=rank):
            return StatefulDataLoader(dataset.stream("train", Key(), rank=rank, world=2), batch_size=5, num_workers=3)

        begun = loader()
        for keys, _ in islice(begun, draw.randint(2, 9)):
            found += keys.tolist()
        state, further = begun.state_dict(), loader()
        further.load_state_dict(state)
        found += keys_of(further)
    assert Counter(found) == Counter(key for key, _ in dataset.stream("train", Key(), shuffle=False))


def test_the_state_of_another_dataset_and_an_impossible_rank_are_refused(opened):
    clean, other = (notbugs.open(name, store=opened[0]) for name in ("clean", "other"))
    with pytest.raises(notbugs.BadInput, match="this state is of version"):
        clean.stream("train").load_state_dict(other.stream("train").state_dict())
    with pytest.raises(notbugs.BadInput, match="rank from 0 to world - 1, got rank 2 and world 2"):
        clean.stream("train", rank=2, world=2)
    with pytest.raises(notbugs.BadInput, match="clean has no split 'val', it has train, test"):
        clean.stream("val")
    with pytest.raises(notbugs.BadInput, match="it has train; it was made from clean, which may have it"):
        other.torch("test")
