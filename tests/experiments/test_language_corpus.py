"""What is a name in news whose capitals were taken away."""

from experiments.language_corpus import tagged


def test_runs_of_capitals_are_names_but_for_a_text_s_first_word():
    words, tags = zip(*tagged("Said Kofi Annan, the UN's chief: It is McDonald's."), strict=True)
    assert words == ('said', 'kofi', 'annan', ',', 'the', "un's", 'chief', ':', 'it', 'is', "mcdonald's", '.')
    assert ' '.join(tags) == 'O B-NAME I-NAME O O B-NAME O O B-NAME O B-NAME O'
