"""cluster.yaml is a configuration that Ray's cluster launcher takes."""

from pathlib import Path

import pytest
import yaml


@pytest.mark.filterwarnings("ignore")
def test_the_cluster_file_validates_offline():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((Path(__file__).parent.parent / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="unexpected"):
        validate_config(prepare_config({**config, "unknown_key": 1}))
