import csv
import io

import pytest

from mdiq.report.evaluation_page import evaluation_page
from mdiq.report.html import html
from mdiq.report.markdown import csv_text, markdown
from mdiq.report.page import LANGUAGES, Chart, Language, Table
from tests.report.fakes import MIB, evaluation
from tests.report.tracing import assert_traces_back, values_of


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_of_the_page_is_in_the_document(language: Language) -> None:
    document = evaluation().as_document()
    page = evaluation_page(document, language)
    text = html(page, document)
    assert assert_traces_back(text, page, document) > 60
    assert "m &lt;1&gt;" in text
    assert f'<html lang="{language}">' in text


def test_both_languages_show_the_same_figures() -> None:
    document = evaluation().as_document()
    en, ja = (sorted(v.pointer for v in values_of(evaluation_page(document, language))) for language in LANGUAGES)
    assert en == ja


def test_markdown_has_the_tables_with_right_figures() -> None:
    document = evaluation().as_document()
    text = markdown(evaluation_page(document, "en"), document, "x-")
    assert "| 2 | 0-0, 1-1 | 10.00 | 20.00 | 2.00 | 300 | 40 |" in text
    assert "| f32 | no | 32 | 3,250 | 150 | 1 |" in text  # 50 + 32 rows of 100
    assert "| f32 | yes | 32 | 150 | 150 | 8 |" in text
    assert "| GQA | 2 | 1.0 | 4.0 | 150 |" in text
    assert "| full multi-head | 4 | 2.0 | 8.0 | 150 |" in text
    assert "![Throughput against devices](x-0-throughput.svg)" in text
    assert "changes nothing on the wire" in text
    assert "m \\<1\\>" in text


def test_answers_that_differ_are_said_to() -> None:
    for is_same, said in ((True, "have the same tokens"), (False, "differ in their tokens")):
        document = evaluation(is_same=is_same).as_document()
        assert said in html(evaluation_page(document, "en"), document)


def test_without_an_uncached_answer_the_page_does_not_speak_of_one() -> None:
    document = evaluation().as_document()
    document["models"][0]["wire"] = document["models"][0]["wire"][:2]
    page = evaluation_page(document, "en")
    assert "Without one, every hop" not in html(page, document)
    assert all("0-wire" != chart.name for chart in page.charts)
    assert sum(isinstance(block, Table) for block in page.blocks) == 4


def test_the_csv_has_every_value_of_the_document() -> None:
    document = evaluation().as_document()
    rows = dict(csv.reader(io.StringIO(csv_text(document))))
    assert rows["/models/0/rings/1/one/figures/decode_tokens_per_s"] == "10.0"
    assert rows["/receipt/command"] == "mdiq <report>"
    assert rows["/settings/link"] == ""


def test_the_weights_of_the_largest_process_are_its_own() -> None:
    document = evaluation().as_document()
    first, second = document["models"][0]["rings"][1]["many"]["nodes"]
    # The first process is larger, with fewer weights: it measures as well.
    first |= {"rss_bytes": 400 * MIB, "weight_bytes": 50 * MIB}
    second |= {"rss_bytes": 300 * MIB, "weight_bytes": 70 * MIB}
    document["models"][0]["rings"][1]["peak_rss_bytes"] = 400 * MIB
    text = markdown(evaluation_page(document, "en"), document, "")
    assert "| 2 | 0-0, 1-1 | 10.00 | 20.00 | 2.00 | 400 | 50 |" in text
    memory = next(
        block
        for block in evaluation_page(document, "en").blocks
        if isinstance(block, Chart) and block.name.endswith("memory")
    )
    assert memory.series[1].points[1].y == 50, "the plot shows what the table does"


def test_settings_are_named_in_the_readers_language() -> None:
    document = evaluation().as_document()
    en, ja = (markdown(evaluation_page(document, language), document, "") for language in LANGUAGES)
    assert "| tokens of a prompt | 8 |" in en and "| プロンプトのトークン数 | 8 |" in ja
    for name in (*document["receipt"]["machine"], *document["settings"]):
        assert f"| {name} |" not in ja or name == "Python"


def test_no_name_is_a_formula_in_a_spreadsheet() -> None:
    rows = dict(csv.reader(io.StringIO(csv_text({"model": "=HYPERLINK(1)", "gain": -0.5, "link": None}))))
    assert rows == {"place": "value", "/model": "'=HYPERLINK(1)", "/gain": "-0.5", "/link": ""}
