"""What the recipes choose, against the published numbers, and that flags win."""

import dataclasses

import pytest

from byol_core.run.options import TrainConfig, build_parser, parse_config
from byol_core.run.plan import Plan, make_plan
from byol_core.views.pixels import Facts

CIFAR, PHOTOS = Facts(50_000, 32), Facts(1_281_167, 375)


def plan(facts: Facts = CIFAR, **options: object) -> Plan:
    return make_plan(TrainConfig(**options), facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs, lr, weight_decay, tau, warmup", [
    (1, 0.45, 1e-6, 0.97, 0.25), (20, 0.45, 1e-6, 0.97, 5), (40, 0.45, 1e-6, 0.97, 10), (69, 0.45, 1e-6, 0.97, 10),
    (100, 0.45, 1e-6, 0.99, 10), (199, 0.45, 1e-6, 0.99, 10), (201, 0.3, 1e-6, 0.99, 10), (300, 0.3, 1e-6, 0.99, 10),
    (649, 0.3, 1e-6, 0.99, 10), (651, 0.2, 1.5e-6, 0.996, 10), (1000, 0.2, 1.5e-6, 0.996, 10)])
def test_paper_recipe_is_the_published_preset_nearest_in_epochs(epochs: int, lr: float, weight_decay: float, tau: float,
                                                                warmup: float) -> None:
    chosen = plan(PHOTOS, recipe="paper", epochs=epochs, batch_size=4096)
    assert (chosen.optimizer, chosen.weight_decay, chosen.tau_base) == ("lars", weight_decay, tau)
    assert (chosen.lr, chosen.warmup_epochs) == (pytest.approx(lr * 4096 / 256), warmup)
    assert (chosen.hidden_dim, chosen.projection_dim, chosen.image_size) == (4096, 256, 224)
    view1, view2 = chosen.views
    assert (view1.blur, view2.blur, view1.solarize, view2.solarize) == (1.0, 0.1, 0.0, 0.2)


def test_quadra_recipe_is_the_source_systems_defaults() -> None:
    chosen = plan(PHOTOS, recipe="quadra")
    assert (chosen.optimizer, chosen.lr, chosen.weight_decay) == ("adam", 3e-4, 0.0)
    assert plan(PHOTOS, recipe="quadra", batch_size=4096).lr == pytest.approx(3e-4)  # it does not scale rates
    assert (chosen.scheduler, chosen.scheduler_interval, chosen.tau_base, chosen.tau_schedule) == (
        "plateau", "epoch", 0.9995, "cosine")
    assert chosen.views[0].interpolation == "bilinear"


def test_small_images_get_the_small_stem_and_no_blur() -> None:
    chosen = plan(arch="resnet18", batch_size=256)
    assert chosen.small_stem and chosen.image_size == 32 and chosen.views[0].blur == chosen.views[1].blur == 0
    assert chosen.lr == pytest.approx(0.06 * 2)  # 0.06 per 128 images
    assert not plan(PHOTOS).small_stem and not plan(arch="vgg11").small_stem


@pytest.mark.parametrize("side, options, size", [
    *((side, {"arch": "resnet18"}, size) for side, size in ((8, 8), (32, 32), (96, 96), (160, 128), (375, 224))),
    (16, {}, 16), (32, {}, 32), (48, {}, 48), (64, {}, 48), (96, {}, 48), (64, {"image_size": 96}, 96),
    (224, {"arch": "conv4"}, 48), (224, {}, 224), (64, {"arch": "conv4", "recipe": "paper"}, 32)])
def test_image_size_follows_the_images_and_is_48_at_most_for_conv4(side: int, options: dict, size: int) -> None:
    assert plan(Facts(999, side), **options).image_size == size


@pytest.mark.parametrize("options, size, views", [
    ({"arch": "conv4"}, 48, 24), ({"arch": "conv4", "image_size": 32}, 32, 24), ({"arch": "conv4", "image_size": 24}, 24, 18),
    ({"arch": "conv4", "image_size": 224}, 224, 84), ({"arch": "conv4", "image_size": 9}, 9, 8),
    ({"arch": "conv4", "view_size": 30}, 48, 30), ({"arch": "conv4", "image_size": 64}, 64, 24),
    ({"arch": "resnet18"}, 64, 64), ({"arch": "resnet18", "view_size": 40}, 64, 40),
    ({"arch": "resnet18", "image_size": 8, "view_size": 160}, 8, 160),
    ({"arch": "conv4", "image_size": 8}, 8, 8), ({"arch": "conv4", "recipe": "paper"}, 32, 32)])
def test_conv4_is_trained_on_views_smaller_than_the_images_it_is_measured_on(options: dict, size: int, views: int) -> None:
    chosen = plan(Facts(9_000, 64), **options)
    assert (chosen.image_size, chosen.view_size) == (size, views)
    assert {view.size for view in chosen.views} == {views}
    assert chosen.plain == dataclasses.replace(chosen.views[0], size=size, blur_kernel=0)
    assert chosen.small_stem == (chosen.arch == "resnet18" and views < 48)


def test_flags_win_over_the_recipe() -> None:
    chosen = plan(optimizer="lars", lr=0.2, tau_base=0.5, small_stem=False, image_size=64, weight_decay=0.0, batch_size=512,
                  predictor_lr=3.0, min_scale=0.3)
    assert chosen.predictor_lr == 3 and all(view.crop_scale == (0.3, 1.0) for view in chosen.views)
    assert (chosen.optimizer, chosen.tau_base, chosen.small_stem, chosen.image_size) == ("lars", 0.5, False, 64)
    assert chosen.lr == pytest.approx(0.2 * 512 / 256) and chosen.weight_decay == 0.0
    reasons = {choice.name: choice.reason for choice in chosen.choices}
    assert reasons["lr"] == "as asked" and reasons["warmup_epochs"] != "as asked"
    assert [choice.name for choice in chosen.choices if choice.asked] == [
        name for name, reason in reasons.items() if reason.endswith("as asked")]
    assert reasons["crop_scale"] == "share of the image's area: as asked"


def test_every_choice_has_a_reason() -> None:
    for recipe in ("auto", "paper", "quadra", "digits"):
        assert all(choice.reason for choice in plan(recipe=recipe).choices)


@pytest.mark.parametrize("optimizer, batch, lr, weight_decay", [
    ("adam", 256, 3e-4, 0.0), ("adam", 4096, 6e-4, 0.0), ("adamw", 256, 1e-3, 1e-2), ("lars", 256, 0.45, 1e-6),
    ("lars", 4096, 7.2, 1e-6), ("sgd", 256, 0.12, 5e-4), ("sgd", 512, 0.24, 5e-4), ("sgd", 1024, 0.24, 5e-4),
    ("sgd", 4096, 0.24, 5e-4)])
def test_rates_go_with_the_optimizer_and_without_lars_grow_up_to_512_images(optimizer: str, batch: int, lr: float,
                                                                            weight_decay: float) -> None:
    chosen = plan(optimizer=optimizer, batch_size=batch)
    assert chosen.lr == pytest.approx(lr) and chosen.weight_decay == weight_decay
    assert any("more collapses" in choice.reason for choice in chosen.choices) == (batch > 512 and optimizer != "lars")
    assert plan(optimizer=optimizer, lr=0.7, batch_size=256).lr == pytest.approx(0.7)


def test_a_plateau_is_of_epochs_and_without_warm_up() -> None:
    chosen = plan(scheduler="plateau")
    assert (chosen.scheduler_interval, chosen.warmup_epochs) == ("epoch", 0.0)
    assert plan(scheduler="plateau", scheduler_interval="step").scheduler_interval == "step"


@pytest.mark.parametrize("images, batch", [(4, 2), (60, 16), (127, 32), (128, 64), (200, 64), (255, 64)])
def test_small_sets_fill_their_batch_twice_at_least(images: int, batch: int) -> None:
    chosen = plan(Facts(images, 32))
    assert (chosen.batch_size, chosen.choices[0].name, chosen.choices[0].value) == (batch, "batch_size", batch)


@pytest.mark.parametrize("images, epochs, batch, updates", [
    (9_000, 20, 64, 2_800), (9_000, 142, 64, 19_880), (9_000, 143, 128, 10_010), (9_000, 285, 256, 9_975),
    (50_000, 1, 64, 781), (50_000, 100, 256, 19_500), (512, 100, 64, 800), (1_281_167, 1, 128, 10_009),
    (300, 10_000, 128, 20_000)])
def test_batches_are_smaller_where_updates_would_be_few(images: int, epochs: int, batch: int, updates: int) -> None:
    """The largest of 64, 128 and 256 with which a run makes 10,000 updates, if any does."""
    chosen = plan(Facts(images, 32), epochs=epochs)
    assert (chosen.batch_size, chosen.total_updates) == (batch, updates)
    reason = chosen.choices[0].reason
    assert ("more updates are worth more" in reason) == (batch < 256 and images > 300)


def test_every_process_has_32_images_of_a_batch_that_is_chosen() -> None:
    assert [make_plan(TrainConfig(epochs=1), CIFAR, processes).batch_size for processes in (1, 2, 4, 8)] == [64, 64, 128, 256]


@pytest.mark.parametrize("facts, options, arch", [
    (Facts(9_000, 64), {"epochs": 100}, "conv4"), (Facts(9_000, 64), {"epochs": 112}, "resnet18"),
    (Facts(9_000, 96), {"epochs": 20}, "conv4"), (Facts(9_000, 97), {"epochs": 20}, "resnet18"),
    (Facts(9_000, 64), {"epochs": 20, "image_size": 128}, "resnet18"), (CIFAR, {"epochs": 19}, "conv4"),
    (CIFAR, {"epochs": 20}, "resnet18"), (CIFAR, {"epochs": 1, "recipe": "paper"}, "resnet18"),
    (CIFAR, {"epochs": 1, "init_from": "weights.pt"}, "resnet18"), (CIFAR, {"epochs": 1, "arch": "vgg11"}, "vgg11"),
    (CIFAR, {"epochs": 1, "recipe": "digits"}, "conv6")])
def test_the_network_follows_the_images_and_the_length_of_the_run(facts: Facts, options: dict, arch: str) -> None:
    assert plan(facts, **options).arch == arch


def test_small_sets_get_a_fast_predictor_and_large_crops() -> None:
    for images, epochs, predictor, least in ((100_000, 9, 10, 0.2), (199_999, 10, 10, 0.2), (200_000, 10, 1, 0.08),
                                             (200_000, 1, 1, 0.08)):
        chosen = plan(Facts(images, 32), epochs=epochs)
        assert chosen.predictor_lr == predictor and [view.crop_scale for view in chosen.views] == [(least, 1.0)] * 2
    assert plan(optimizer="adamw").predictor_lr == 1  # whose rate was not tried with it
    assert plan(recipe="paper").views[0].crop_scale == (0.08, 1.0) and plan(recipe="paper").predictor_lr == 1


def test_the_views_of_the_sample_have_no_crop_to_change() -> None:
    with pytest.raises(ValueError, match="--min-scale 0.3: the views of the sample show whole images - leave it out"):
        plan(recipe="digits", min_scale=0.3)


@pytest.mark.parametrize("seen, epochs, updates", [
    (64, 1, 1), (63, 1, 1), (640, 1, 10), (50_000, 1, 781), (50_048, 2, 391), (64 * 1_000, 2, 500), (64 * 7_810, 10, 781),
    (64 * 1_563, 3, 521)])
def test_a_run_of_so_many_images_has_whole_epochs(seen: int, epochs: int, updates: int) -> None:
    """781 batches of 64 fill an epoch of 50,000 images; shorter epochs come closer to what was asked for."""
    chosen = make_plan(TrainConfig(batch_size=64), CIFAR, seen=seen)
    assert (chosen.epochs, chosen.updates_per_epoch) == (epochs, updates)
    again = make_plan(TrainConfig(batch_size=64), CIFAR, seen=chosen.total_updates * 64)
    assert (again.epochs, again.updates_per_epoch) == (epochs, updates)  # as a resumed run asks


@pytest.mark.parametrize("batch, lr", [(32, 1e-3), (64, 2e-3), (256, 2e-3), (1024, 2e-3)])
def test_the_sample_has_a_fast_predictor_and_a_rate_that_does_not_grow_beyond_its_batch(batch: int, lr: float) -> None:
    """A slow one costs 8 points at 5 labels per class (RESULTS.md), which the band of the accuracy test is too wide to see."""
    chosen = plan(recipe="digits", batch_size=batch)
    assert chosen.lr == pytest.approx(lr) and chosen.predictor_lr == 10


def test_the_views_are_among_what_is_said() -> None:
    said = {choice.name: choice.value for choice in plan().choices}
    assert (said["crop_scale"], said["blur"], said["solarize"]) == ("0.2 to 1", "0 and 0", "0 and 0.2")
    large = {choice.name: choice.value for choice in plan(Facts(1000, 224)).choices}
    assert large["blur"] == "1 and 0.1"


def test_updates_are_whole_batches() -> None:
    chosen = plan(Facts(1000, 32), batch_size=96, accum_steps=3, epochs=7)
    assert (chosen.updates_per_epoch, chosen.total_updates, chosen.micro_batch) == (10, 70, 32)


@pytest.mark.parametrize("images, epochs, warmup, half_life", [
    (256, 1, 0.1, 2), (256, 100, 10, 3), (50_000, 10, 1, 58.5), (50_000, 1000, 10, 173)])
def test_auto_warms_up_for_a_tenth_of_the_run_and_forgets_the_random_target_after_three_percent(
        images: int, epochs: int, warmup: float, half_life: float) -> None:
    """At most ten epochs. At least two updates, so that the only epoch of a run moves the target; at most those of the
    paper's longest preset.
    """
    chosen = plan(Facts(images, 32), epochs=epochs, batch_size=256)
    assert chosen.warmup_epochs == pytest.approx(warmup) and chosen.tau_base ** half_life == pytest.approx(0.5)


def test_auto_takes_the_papers_optimizer_and_heads_for_large_sets() -> None:
    for images, optimizer, hidden in ((199_999, "sgd", 1024), (200_000, "lars", 4096), (1_281_167, "lars", 4096)):
        chosen = plan(Facts(images, 375), epochs=100)
        assert (chosen.optimizer, chosen.hidden_dim) == (optimizer, hidden)
    assert (chosen.lr, chosen.weight_decay) == (0.45, 1e-6)  # the paper's 100-epoch preset, at 256 images


@pytest.mark.parametrize("images, options, message", [
    (100, {"batch_size": 256}, "100 images < --batch-size 256 - use --batch-size 100 or less"),
    (1, {}, "1 image is not enough"), (3, {}, "3 images < --batch-size 64 - use --batch-size 3 or less"),
    (100, {"batch_size": 10, "accum_steps": 4}, "use a multiple of 4"),
    (100, {"batch_size": 4, "accum_steps": 4}, "use 8 or more"),
])
def test_batches_that_do_not_fit_are_refused(images: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(Facts(images, 32), **options)
    assert message in str(error.value)


def test_every_option_has_one_flag_and_every_flag_one_option() -> None:
    parsed = vars(build_parser().parse_args([]))
    assert parsed == {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert parse_config([]) == TrainConfig()


@pytest.mark.parametrize("flag", ["--optimizer", "--image-size", "--view-size", "--workers"])
def test_auto_reads_as_unset(flag: str) -> None:
    assert parse_config([flag, "auto"]) == TrainConfig()
