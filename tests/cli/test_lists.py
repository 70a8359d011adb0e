"""`lowprec recipes`: everything that is registered, and everything about one."""

from lowprec import recipes


def test_every_recipe_is_listed_and_described(lowprec):
    status, output, _ = lowprec("recipes")
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()] == list(recipes.names())
    for name in recipes.names():
        assert lowprec("recipes", name)[1].strip() == recipes.get(name).describe().strip()


def test_a_short_form_is_described_too(lowprec):
    status, output, _ = lowprec("recipes", "fwd=int4@row dgrad=int8@row(stochastic)")
    assert status == 0 and "stochastic" in output and "int4@row" in output
