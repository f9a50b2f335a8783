from pathlib import Path

import pytest

from tests.test_shipped_configs import PARAMETERS, RUNS, num_gpus
from tools import describe_recipes

PAGE = Path(__file__).parent.parent.parent / "docs/recipes.md"
RECIPES = describe_recipes.all_recipes()


def test_the_shipped_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == describe_recipes.describe(), (
        "run: python tools/describe_recipes.py"
    )


def test_the_page_and_the_comments_of_the_runs_name_the_same_gpus():
    on_gpus = {path.stem: num_gpus(path) for path in RUNS if num_gpus(path)}
    assert {recipe.name: recipe.num_gpus for recipe in RECIPES} == on_gpus


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe.gpu_gib}")
def test_the_layout_divides_and_leaves_half_of_the_gpu(recipe):
    recipe.deepspeed.num_micro_batches(recipe.dp_size)
    held = recipe.model_state().total + recipe.whole_weights()
    assert held < recipe.gpu_gib * 2**30 / 2


def test_memory_is_what_one_counts_by_hand():
    recipe = describe_recipes.recipe_of("llama2_7b", 80)
    numbers = PARAMETERS["llama2_7b"]
    # of each number: bf16 weight 2, fp32 gradient 4, fp32 master and two moments 12, cut over 64 ranks
    assert recipe.model_state().total == pytest.approx((2 + 4 + 12) * numbers / 64)
    assert recipe.whole_weights() == 2 * numbers
    zero_1 = describe_recipes.recipe_of("pretrain_460m", 40)
    assert zero_1.model_state().total == pytest.approx((2 + 4 + 12 / 16) * PARAMETERS["pretrain_460m"])
    assert zero_1.whole_weights() == 0


def test_a_gpu_of_40_gb_changes_what_the_table_says_only_there():
    assert describe_recipes.recipe_of("llama3_70b", 80).run.parallel.recompute == "none"
    assert describe_recipes.recipe_of("llama3_70b", 40).run.parallel.recompute == "full"


def test_the_page_is_written_where_it_is_asked_for(tmp_path, capsys):
    assert describe_recipes.main(["--output", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == describe_recipes.describe()
    assert describe_recipes.main(["--output", str(tmp_path / "no" / "such.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
