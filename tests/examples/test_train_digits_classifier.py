"""The example that compares EfficientNet-B0 on digits, on few images."""

import pytest
import torch
import train_digits_classifier as example


@pytest.fixture
def few_digits(monkeypatch):
    whole = example.load(32)
    few = example.Digits(*(part[:32] for part in whole))
    monkeypatch.setattr(example, "load", lambda size: few)
    return whole


def test_both_networks_train_and_the_curves_are_drawn(few_digits, tmp_path, capsys):
    options = ["--seeds=1", "--epochs=1", "--batch=16", f"--plot={tmp_path / 'new' / 'digits.png'}"]
    runs = example.main(options)
    assert list(runs) == ["torchvision", "dlkernels"]
    assert all(0.0 <= run.accuracies[0] <= 1.0 for of in runs.values() for run in of)
    assert (tmp_path / "new" / "digits.png").stat().st_size > 0
    assert capsys.readouterr().out.count("accuracy") == 2


def test_digits_for_the_test_are_held_out(few_digits):
    assert few_digits.train_images.shape == (1437, 3, 32, 32)
    assert few_digits.test_images.shape == (360, 3, 32, 32)


def test_networks_start_from_the_same_weights():
    theirs, ours = (example.build(name, 0).state_dict() for name in example.NETWORKS)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
