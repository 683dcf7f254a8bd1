"""Whole runs of a small model: the reward rises, whatever kills a run loses nothing, and failures say why."""

import math
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.small_runs import begin, save_model, save_questions, small_config, steps_of, trained
from treepo.errors import ConfigError, TreePOError
from treepo.run import checkpoint
from treepo.run.build import training
from treepo.run.checkpoint import State
from treepo.run.folder import RunFolder, read_metrics
from treepo.run.shaping import overlong
from treepo.run.trainer import Observer, Trainer
from treepo.tree import ScoredTree, Stop, Tree, read_trees

KINDS = (
    *("treepo", "segment", "spo", "treerl", "attnrl", "tree_grpo"),
    *("grpo", "dr_grpo", "rloo", "reinforce_pp"),
)
UNWARMED = ("warmup=null",)  # answers nothing right, so that every query is flat


# Learning


def test_the_reward_rises(tmp_path):
    trained(tmp_path, "trainer.steps=14", "trainer.prompts_per_step=6", "trainer.dynamic_sampling=null")
    rewards = [m["reward/mean"] for m in steps_of(tmp_path / "run")]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1, rewards


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_trains(kind, tmp_path, start):
    trainer = trained(tmp_path, *start, "trainer.steps=1", f"advantage.kind={kind}")
    (step,) = steps_of(tmp_path / "run")
    assert step["train/updates"] == 1 and step["train/grad_norm"] > 0
    assert changed(trainer)


def test_independent_responses_with_grpo_train_too(tmp_path, start):
    trained(tmp_path, *start, "sampler.mode=iid", "advantage.kind=grpo", "trainer.save_trees_every=1")
    for step in steps_of(tmp_path / "run"):
        assert step["tokens/sharing"] == 1.0 and step["rollouts/count"] == 8 * step["prompts/sampled"]
    for rollout in read_trees(tmp_path / "run" / "trees" / "step-000001.jsonl.gz"):
        assert all(rollout.tree.nodes[leaf].parent == 0 for leaf in rollout.tree.leaves())


def test_a_leaner_update_is_nearly_the_same_update(tmp_path, start):
    steps = []
    lean = ("trainer.gradient_checkpointing=true", "trainer.precision=bfloat16", "trainer.max_tokens=20")
    loss = ("loss.shared_tokens=mean", "loss.rollout_cap=2", "trainer.mini_batches=2", "trainer.steps=1")
    for name, more in (("plain", ()), ("lean", lean)):
        (tmp_path / name).mkdir()
        assert changed(trained(tmp_path / name, *start, *loss, *more))
        steps += steps_of(tmp_path / name / "run")
    plain, lean_step = steps
    assert plain["kl/rollout"] < 1e-8 < lean_step["kl/rollout"] < 1e-3  # the engine's log-probs stay float32
    assert plain["clip/rollout_capped"] == 0.0
    assert lean_step["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=0.1)
    assert lean_step["entropy/mean"] == pytest.approx(plain["entropy/mean"], rel=0.02)


def test_the_penalty_on_leaving_the_initial_policy_holds_it_back(tmp_path, start):
    divergence = []
    for kl in (0.001, 3.0):
        (tmp_path / str(kl)).mkdir()
        trained(tmp_path / str(kl), *start, f"loss.kl={kl}", "trainer.steps=4", "trainer.mini_batches=2")
        divergence.append(steps_of(tmp_path / str(kl) / "run")[-1]["kl/reference"])
    assert divergence[1] < 0.5 * divergence[0]


def changed(trainer: Trainer) -> bool:
    first = load_file(trainer.folder.checkpoints / "step-000000" / "model.safetensors")
    last = trainer.actor.model.state_dict()
    return any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize("max_tokens", [10, 100])  # in pieces, and in several rows, whose losses must add up
def test_a_step_follows_the_flat_textbook_gradient(max_tokens, tmp_path, start):
    # From the trees on disk and a plain transformers model alone: GRPO with a token mean, one row per leaf.
    overrides = ("trainer.steps=1", "trainer.dynamic_sampling=null", "trainer.save_trees_every=1")
    rows = f"trainer.max_tokens={max_tokens}"
    # Temperature, too: log-probs are those of the distribution that was sampled.
    hot = ("sampler.sampling.temperature=1.3", "advantage.kind=grpo", "trainer.grad_clip=1e9")
    trainer = trained(tmp_path, *start, *overrides, rows, *hot)
    model = AutoModelForCausalLM.from_pretrained(trainer.folder.checkpoints / "step-000000").eval()
    loss, tokens = torch.zeros(()), 0
    for rollout in read_trees(tmp_path / "run" / "trees" / "step-000001.jsonl.gz"):
        rewards = np.array(rollout.rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for leaf, advantage in zip(rollout.tree.leaves(), advantages, strict=True):
            ids, prompt = torch.tensor(rollout.tree.tokens(leaf)), len(rollout.tree.prompt)
            scores = model(input_ids=ids[None]).logits[0, prompt - 1 : -1] / 1.3
            loss = loss - advantage * scores.log_softmax(-1).gather(1, ids[prompt:, None]).sum()
            tokens += len(ids) - prompt
    (loss / tokens).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in trainer.actor.model.named_parameters():
        found = trainer.learner.optimizer.state[parameter]["exp_avg"] / (1 - 0.9)  # after one step of AdamW
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-6)


def test_several_updates_per_step_follow_the_flat_textbook_ones(tmp_path, start):
    # GRPO with PPO's clip, from the trees on disk, by plain AdamW on a plain model. Two queries make two mini-batches;
    # which of them is first is drawn, so one of both orders must fit.
    overrides = ("trainer.prompts_per_step=2", "trainer.mini_batches=2", "trainer.lr=1e-2", "advantage.kind=grpo")
    clips = ("loss.clip_low=0.1", "loss.clip_high=0.15", "loss.dual_clip=1.2")
    keep = ("trainer.steps=1", "trainer.dynamic_sampling=null", "trainer.save_trees_every=1", "trainer.grad_clip=1e9")
    trainer = trained(tmp_path, *start, *overrides, *clips, *keep, "seed=5")
    rollouts = list(read_trees(tmp_path / "run" / "trees" / "step-000001.jsonl.gz"))
    assert all(len(set(rollout.rewards)) == 2 for rollout in rollouts), "both must matter"
    found = trainer.learner.optimizer.state_dict()["state"]
    moments = torch.cat([found[i]["exp_avg"].flatten() for i in range(len(found))])
    off = []
    for order in (rollouts, rollouts[::-1]):
        model = AutoModelForCausalLM.from_pretrained(trainer.folder.checkpoints / "step-000000").eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with torch.no_grad():
            old = [[flat_logprobs(model, rollout.tree, leaf) for leaf in rollout.tree.leaves()] for rollout in order]
        clipped = torch.zeros(3)
        for rollout, before in zip(order, old, strict=True):
            rewards = np.array(rollout.rewards)
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            costs = []
            for leaf, sampled, advantage in zip(rollout.tree.leaves(), before, advantages.tolist(), strict=True):
                ratio = (flat_logprobs(model, rollout.tree, leaf) - sampled).exp()
                gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - 0.1, 1 + 0.15))
                if advantage < 0:
                    gain = torch.maximum(gain, torch.tensor(1.2 * advantage))
                    clipped += torch.tensor([(ratio < 0.9).sum(), 0, (ratio > 1.2).sum()])
                else:
                    clipped += torch.tensor([0, (ratio > 1.15).sum(), 0])
                costs.append(-gain)
            optimizer.zero_grad()
            torch.cat(costs).mean().backward()
            optimizer.step()
        assert clipped.min() > 0, "every clip must matter"
        expected = torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in model.parameters()])
        off.append(((moments - expected).norm() / expected.norm()).item())
    assert min(off) < 1e-2 < max(off), off


def flat_logprobs(model: torch.nn.Module, tree: Tree, leaf: int) -> torch.Tensor:
    ids, prompt = torch.tensor(tree.tokens(leaf)), len(tree.prompt)
    scores = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
    return scores.log_softmax(-1).gather(1, ids[prompt:, None])[:, 0]


def test_the_learning_rate_rises_linearly(tmp_path, start):
    trained(tmp_path, *start, "trainer.steps=4", "trainer.lr=3e-4", "trainer.lr_warmup_steps=3")
    assert [m["train/lr"] for m in steps_of(tmp_path / "run")] == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4])


def test_the_gradient_is_clipped(tmp_path, start):
    trainer = trained(tmp_path, *start, "trainer.steps=1", "trainer.grad_clip=0.01")
    (step,) = steps_of(tmp_path / "run")
    assert step["train/grad_norm"] > 0.02  # as it was
    moments = [state["exp_avg"].flatten() for state in trainer.learner.optimizer.state.values()]
    assert torch.cat(moments).norm().item() / (1 - 0.9) == pytest.approx(0.01, rel=1e-3)


def test_the_overlong_penalty_falls_linearly_over_the_last_tokens():
    tree = Tree([5])
    for length in (15, 16, 18, 20):
        tree.add(0, [7] * length, [-1.0] * length, seed=length, version=0, stop=Stop.EOS)
    lost = tree.add(0, [], [], seed=1, version=0, stop=Stop.ERROR)
    rollout = ScoredTree("p", tree, [1.0, 1.0, 1.0, 0.0, None], {lost: "engine error"})
    assert overlong(rollout, window=4, penalty=0.5, budget=20).rewards == [1.0, 1.0, 0.75, -0.5, None]
    assert rollout.rewards == [1.0, 1.0, 1.0, 0.0, None]
    assert overlong(rollout, window=0, penalty=0.5, budget=20) is rollout


# Dynamic sampling


def test_flat_queries_are_replaced_and_the_stream_moves_on(tmp_path, start):
    dynamic = ("trainer.dynamic_sampling.oversample=1.5", "trainer.prompts_per_step=3", "sampler.width=3")
    trainer = trained(tmp_path, *start, *dynamic, "trainer.save_trees_every=1", "trainer.steps=4")
    steps = steps_of(tmp_path / "run")
    assert trainer.state.position == sum(m["prompts/sampled"] for m in steps)
    assert any(m["prompts/sampled"] > 5 for m in steps), "a further round would be worth seeing"
    seen = []
    for step in steps:
        assert 5 <= step["prompts/sampled"] <= 5 + 5 + 5  # ceil(1.5 * 3) and two rounds more
        rollouts = list(read_trees(tmp_path / "run" / "trees" / f"step-{step['step']:06d}.jsonl.gz"))
        spread = sum(len(set(rollout.rewards)) > 1 for rollout in rollouts)
        assert len(rollouts) == step["prompts/sampled"]
        assert step["prompts/used"] == min(3, spread)
        seen += [rollout.problem_id for rollout in rollouts]
    epochs = [seen[i : i + 4] for i in range(0, len(seen) - 3, 4)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)  # every problem once, none skipped
    assert len({tuple(epoch) for epoch in epochs}) > 1  # in another order each time


def test_a_step_without_any_spread_changes_nothing_and_goes_on(tmp_path):
    trainer = trained(tmp_path, *UNWARMED, "trainer.dynamic_sampling.rounds=1")
    for step in steps_of(tmp_path / "run"):
        assert (step["prompts/sampled"], step["prompts/used"], step["train/updates"]) == (8, 0, 0)
        assert step["reward/mean"] == 0.0
    assert trainer.state.step == 2
    assert not changed(trainer)


def test_without_dynamic_sampling_flat_queries_are_used(tmp_path):
    trained(tmp_path, *UNWARMED, "trainer.dynamic_sampling=null", "trainer.steps=1")
    (step,) = steps_of(tmp_path / "run")
    assert (step["prompts/sampled"], step["prompts/used"], step["train/updates"], step["train/grad_norm"]) == (
        4,
        4,
        1,
        0.0,
    )


# What a run leaves


def test_metrics_have_their_fields(tmp_path, start):
    trained(tmp_path, *start, "trainer.eval_every=1", "trainer.steps=1")
    begin, step, end = read_metrics(tmp_path / "run" / "metrics.jsonl")
    groups = {
        "reward": {"mean", "std", "unknown"},
        "prompts": {"sampled", "used"},
        "rollouts": {"count"},
        "tokens": {"generated", "flat", "sharing"},
        "response_tokens": {"mean", "max"},
        "entropy": {"sampled", "mean"},
        "staleness": {"mean", "mixed"},
        "train": {"lr", "updates", "grad_norm"},
        "loss": {"total"},
        "clip": {"fraction"},
        "kl": {"old", "rollout"},
        "seconds": {"step", "sample", "score", "update"},
    }
    expected = {"step", *(f"{group}/{name}" for group, names in groups.items() for name in names)}
    stops = {name: count for name, count in step.items() if name.startswith("stop/")}
    assert step.keys() - stops.keys() == expected
    assert step["rollouts/count"] == sum(stops.values()) == 8 * step["prompts/sampled"]
    assert step["response_tokens/max"] >= step["response_tokens/mean"] > 0
    assert 0 < step["reward/std"] <= 0.5  # of rewards that are 0 or 1
    assert step["tokens/sharing"] == step["tokens/flat"] / step["tokens/generated"] >= 1
    assert step["kl/old"] == step["clip/fraction"] == 0  # one update per batch: on-policy
    assert begin.keys() == end.keys()
    assert {"step", "tokens/total", "eval/greedy/pass@1", "eval/sampled/pass@4/low"} <= end.keys()
    assert (begin["step"], end["step"]) == (0, 1)
    assert end["tokens/total"] == step["tokens/generated"]


def test_several_updates_per_step_move_away_from_the_sampling_policy(tmp_path, start):
    many = ("trainer.mini_batches=2", "trainer.dynamic_sampling=null", "trainer.lr=1e-2")
    trained(tmp_path, *start, *many, "trainer.steps=1")
    (step,) = steps_of(tmp_path / "run")
    assert step["train/updates"] == 2 and step["kl/old"] > 0


def test_a_checkpoint_is_a_model_folder_of_transformers(tmp_path, start):
    trainer = trained(tmp_path, *start, "trainer.steps=1")
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("x=6;x-=2;,?")])
    assert ids[0].tolist() == trainer.actor.tokenizer.encode("x=6;x-=2;,?")
    assert tokenizer.decode(ids[0]) == "x=6;x-=2;,?" and tokenizer.eos_token == "<eos>"  # noqa: S105
    assert model(input_ids=ids).logits.shape == (1, 11, model.config.vocab_size)
    for name, value in trainer.actor.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trained(tmp_path, *UNWARMED, "trainer.steps=3", "trainer.save_every=1", "trainer.keep_checkpoints=2")
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-000002", "step-000003"]


def test_an_observer_hears_of_everything_once(tmp_path):
    heard: list[tuple] = []

    class Listener(Observer):
        def warming_up(self, step, steps, loss):
            heard.append(("warm-up", step, steps))

        def sampling(self, step, trees_done, trees):
            heard.append(("sampling", step, trees_done, trees))

        def evaluating(self, step, trees_done, trees):
            heard.append(("evaluating", step, trees_done, trees))

        def stepped(self, metrics):
            heard.append(("stepped", metrics["step"]))

        def evaluated(self, step, evaluation):
            heard.append(("evaluated", step))

        def saved(self, path):
            heard.append(("saved", path.name))

    overrides = ("warmup.steps=2", "trainer.steps=1", "trainer.eval_every=1", "trainer.dynamic_sampling=null")
    with training(small_config(tmp_path, *overrides), observer=Listener()) as trainer:
        trainer.run()
    evaluating = [("evaluating", 0, i, 8) for i in range(1, 9)]
    assert heard == [
        *[("warm-up", 1, 2), ("warm-up", 2, 2), ("saved", "step-000000")],
        *[*evaluating, ("evaluated", 0)],
        *[*[("sampling", 1, i, 4) for i in range(1, 5)], ("stepped", 1)],
        *[*[("evaluating", 1, *rest) for _, _, *rest in evaluating], ("evaluated", 1), ("saved", "step-000001")],
    ]


# Failures


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, start):
    huge = ("trainer.overlong_tokens=20", "trainer.overlong_penalty=1e30", "advantage.kind=dr_grpo")
    with pytest.raises(
        TreePOError,
        match=r"^step 1: the gradient is not finite \(norm inf\) and was not applied: .*--model .*step-000000",
    ):
        trained(tmp_path, *start, *huge)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_end_the_run_in_one_line(value, tmp_path, start):
    with training(small_config(tmp_path, *start)) as trainer:
        with torch.no_grad():
            trainer.actor.model.model.norm.weight.fill_(value)
        with pytest.raises(TreePOError) as caught:
            trainer.run()
    assert "finite" in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    config = small_config(tmp_path, *UNWARMED)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    refused = pytest.raises(
        ConfigError, match=r"step-000000: cannot write the checkpoint: Not a directory; .*--resume$"
    )
    with refused, training(config) as trainer:
        trainer.run()


def test_a_disk_that_fills_up_under_a_checkpoint_leaves_the_last_one(tmp_path):
    trainer = trained(tmp_path, *UNWARMED, "trainer.steps=1")
    folder, actor = trainer.folder.checkpoints, trainer.actor
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # the weights need more
    try:
        with pytest.raises(ConfigError, match=r"step-000002: cannot write the checkpoint: .*File too large") as caught:
            checkpoint.save(folder, actor.model, actor.tokenizer, trainer.learner.optimizer, State(step=2), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000001"]


def test_a_full_disk_under_metrics_and_trees_is_one_line(tmp_path, random_rollout):
    folder = RunFolder(tmp_path / "run", {}, resume=False)
    folder.metrics.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        folder.record({"step": 1})
    (folder.path / "trees").write_text("a file")
    with pytest.raises(ConfigError, match=r"trees.*: cannot be written: "):
        folder.write_trees(1, [random_rollout(0)])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"^out: cannot write to .*: (File exists|Not a directory)$"):
        begin(small_config(tmp_path, *UNWARMED))


def test_a_task_without_a_tokenizer_cannot_create_a_model(tmp_path):
    questions = save_questions(tmp_path / "questions.jsonl")
    overrides = (f"task={{kind: dataset, path: {questions}}}", *UNWARMED)
    with pytest.raises(ConfigError, match=r"^task 'dataset' has no tokenizer to create a model with: set model\.path"):
        begin(small_config(tmp_path, *overrides))


def test_a_missing_tracker_names_the_command_that_installs_it(tmp_path):
    trackers = [name for name in ("tensorboard", "trackio", "wandb") if not installed(name)]
    for name in trackers:
        with pytest.raises(ConfigError, match=rf"^trainer\.trackers: {name} is not installed: pip install {name}$"):
            begin(small_config(tmp_path, *UNWARMED, f"out={tmp_path / name}", f"trainer.trackers=[{name}]"))
        assert not (tmp_path / name).exists(), "nothing may be written before"


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_sliding_window_is_refused(tmp_path):
    save_model(tmp_path / "model", "qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=0)
    overrides = ("model.create=null", "warmup=null", f"model.path={tmp_path / 'model'}")
    with pytest.raises(ConfigError, match=r"^model: qwen3 uses sliding_attention; only full attention is supported$"):
        begin(small_config(tmp_path, *overrides))
