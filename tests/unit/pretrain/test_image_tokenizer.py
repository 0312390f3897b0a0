"""Training a visual tokenizer: what it says of its codebook."""

from __future__ import annotations

import pytest

from beit3.config import replace
from beit3.data.streams import Source, Stream
from beit3.data.transforms import CropConfig
from beit3.errors import ConfigError
from beit3.pretrain.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from beit3.tokenizer.teachers import TeacherConfig
from beit3.tokenizer.vqkd import VQKDConfig

CONFIG = ImageTokenizerConfig(
    tokenizer=VQKDConfig(image_size=(16, 16), patch_size=8, width=16, depth=1, num_heads=2, codebook_size=8),
    teacher=TeacherConfig(),
    images=Stream(sources=(Source(path="images"),), batch_size=2),
    crop=CropConfig(size=16),
)


def test_recorded_codes_are_refused_where_nothing_reads_them() -> None:
    stream = Stream(sources=(Source(path="images", codes="codes"),), batch_size=2)
    with pytest.raises(ConfigError, match="training reads no codes"):
        replace(CONFIG, images=stream)
    with pytest.raises(ConfigError, match="all sources of a stream have `codes`, or none has"):
        Stream(sources=(Source(path="images", codes="codes"), Source(path="more")), batch_size=2)


@pytest.mark.parametrize(("use", "bound", "heard"), [(0.6, 0.5, False), (0.5, 0.5, False), (0.49, 0.5, True)])
def test_a_collapsing_codebook_raises_an_alarm(use: float, bound: float, heard: bool) -> None:
    task = ImageTokenizer(replace(CONFIG, least_use=bound))
    alarms = task.alarms({"codebook_use": use})
    assert bool(alarms) == heard
    assert not heard or "only 49.0% of the codes are in use (bound 50%)" in alarms[0]
