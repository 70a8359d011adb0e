"""`lowprec recipes` and `lowprec optimizers`: everything that is registered, and everything about one."""

from lowprec import optim, recipes
from lowprec.training import update_rules


def test_every_recipe_is_listed_and_described(lowprec):
    status, output, _ = lowprec("recipes")
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()] == list(recipes.names())
    for name in recipes.names():
        assert lowprec("recipes", name)[1].strip() == recipes.get(name).describe().strip()


def test_a_short_form_is_described_too(lowprec):
    status, output, _ = lowprec("recipes", "fwd=int4@row dgrad=int8@row(stochastic)")
    assert status == 0 and "stochastic" in output and "int4@row" in output


def test_every_optimizer_is_listed_with_its_bytes_and_described(lowprec):
    status, output, _ = lowprec("optimizers")
    rows = {row[1].strip(): row[2].strip() for row in (line.split("|") for line in output.splitlines()[2:])}
    assert status == 0 and tuple(rows) == update_rules.names()
    # float32 is 4 bytes a moment, a mask 1 byte a weight of a kernel; 8 and 4 bits have scales besides.
    assert rows["adamw"] == "8.00" and rows["sgd"] == "4.00" and rows["sparse_adamw"] == "8.99"
    assert float(rows["adam8"]) <= 2.04 and float(rows["adam4"]) <= 1.07
    status, output, _ = lowprec("optimizers", "stable_spam")
    assert status == 0 and "arXiv 2502.17055" in output
    assert all(setting in output for setting in optim.get("stable_spam").settings)
    assert lowprec("optimizers", "sgd")[0] == 0


def test_an_unknown_optimizer_is_bad_usage(lowprec):
    status, _, errors = lowprec("optimizers", "stable_adan4")
    assert status == 2 and "did you mean stable_adam4" in errors
