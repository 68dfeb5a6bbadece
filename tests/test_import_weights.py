"""A teacher from a file: the stage that imports it, its errors, and the way back to a file."""

import chex
import jax
import numpy as np
import pytest

from dmd_jax import main
from dmd_jax.commands import export
from dmd_jax.experiment import workdir as workdir_lib
from dmd_jax.runtime import storage
from dmd_jax.stages import import_weights
from dmd_jax.weights import edm, published
from tests.helpers.runs import nfe_of, params_of, put_classifier, result_of, smoke, stage_of


@pytest.fixture(scope="module")
def teacher_file(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "teacher.safetensors"
    export.export(finished, "teacher", path)
    return path


def importing(path, **network):
    """A config whose teacher is a file."""
    config = smoke()
    config.teacher = dict(
        program="import_weights", checkpoint=str(path), sampler=dict(name="heun", num_steps=4)
    )
    config.network.update(network)
    config.pairs.update(count=32, shard_size=32)
    return config


def test_a_file_becomes_a_one_step_generator(finished, teacher_file, tmp_path, capsys):
    config = importing(teacher_file)
    put_classifier(finished, tmp_path)
    main.run(config, tmp_path)
    chex.assert_trees_all_equal(
        params_of(config, tmp_path, "teacher"), params_of(smoke(), finished, "teacher")
    )
    assert nfe_of(result_of(tmp_path)) == {"teacher": 7, "dmd": 1}
    assert storage.read_json(tmp_path / "teacher/source.json")["sha256"] == published.sha256(
        teacher_file
    )
    main.run(config, tmp_path)
    assert capsys.readouterr().out.count("done already") == 4


def test_export_has_edms_keys(teacher_file):
    tensors, settings = edm.read(teacher_file)
    assert (
        settings["name"] == "unet_edm.ddpmpp"
        and settings["size"] == 8
        and settings["multipliers"] == (1,)
    )
    assert tensors["enc.8x8_conv.weight"].shape == (8, 1, 3, 3)


def test_all_misfits_between_checkpoint_and_config_are_listed(teacher_file, tmp_path):
    with pytest.raises(ValueError) as error:
        main.run(importing(teacher_file, width=16, num_classes=0), tmp_path)
    assert "width is 8 in the checkpoint, 16 in the config" in str(error.value)
    assert "num_classes is 10 in the checkpoint, 0 in the config" in str(error.value)


def test_a_missing_file_is_named_before_anything_runs(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"edm-cifar10-32x32-cond-vp\.pkl does not exist.*published at "
        r"https://nvlabs-fi-cdn\.nvidia\.com",
    ):
        main.run(importing(tmp_path / "edm-cifar10-32x32-cond-vp.pkl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_file_is_not_taken_for_the_first(teacher_file, tmp_path):
    other = tmp_path / "teacher.safetensors"
    other.write_bytes(teacher_file.read_bytes())
    config = importing(other)
    import_weights.run(stage_of(config, "teacher"), tmp_path / "run")
    assert import_weights.done(stage_of(config, "teacher"), tmp_path / "run")
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is about other weights than"):
        import_weights.done(stage_of(config, "teacher"), tmp_path / "run")
    other.unlink()
    assert import_weights.done(stage_of(config, "teacher"), tmp_path / "run")


def test_a_file_with_a_promised_hash(tmp_path):
    path = tmp_path / "vgg-00000000.pth"
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"is damaged: its name promises a SHA-256 of 00000000"):
        published.find(path)


def test_export_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="is no run's directory"):
        export.export(tmp_path, "dmd", tmp_path / "out.safetensors")


def test_params_are_on_all_devices(teacher_file, tmp_path):
    config = importing(teacher_file)
    import_weights.run(stage_of(config, "teacher"), tmp_path)
    leaf = jax.tree.leaves(workdir_lib.load_params(stage_of(config, "teacher"), tmp_path))[0]
    assert (
        len(leaf.sharding.device_set) == 8
        and leaf.sharding.is_fully_replicated
        and leaf.dtype == np.float32
    )
