"""Choose the story books of a collection of JSON lines (title, author, year, text), and train a tokenizer on them.

    python examples/select_books.py books/train.jsonl.xz stories.jsonl.xz stories.model [--vocab-size 6144]

The authors are those whose books a child or a young reader might be given: fairy tales, adventures, mysteries.
"""

import argparse
import json
import lzma
from pathlib import Path

from pldr.tokenizer import train_sentencepiece

AUTHORS = """Abbie Farwell Brown; Aesop; Agatha Christie; Alexandre Dumas; Anna Sewell; Anthony Hope; Arthur Conan Doyle;
Charles Dickens; Daniel Defoe; Edgar Rice Burroughs; Edith Nesbit; Emma Orczy; Frances Hodgson Burnett;
Gabrielle-Suzanne Barbot de Villeneuve; Gaston Leroux; George MacDonald; Gertrude Chandler Warner; H. Rider Haggard;
H.G. Wells; Hans Christian Andersen; Henry van Dyke; Horatio Alger; Howard Pyle; J. M. Barrie; J. Meade Falkner;
Jack London; James Stephens; Johann David Wyss; Johanna Spyri; John Buchan; John Ruskin; Johnston McCulley; Jules Verne;
Kenneth Grahame; L. Frank Baum; Lewis Carroll; Lord Dunsany; Louisa May Alcott; Lucy Maud Montgomery; Mark Twain;
Maurice Leblanc; Nathaniel Hawthorne; Oscar Wilde; Owen Wister; P.G. Wodehouse; Robert Louis Stevenson; Rudyard Kipling;
The Brothers Grimm; Thomas Bulfinch; Washington Irving; Zane Grey"""
# Of collections under one name.
TITLES = ("One Thousand and One Nights", "Hawaiian Folk Tales")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("books", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--vocab-size", type=int, default=6144)
    arguments = parser.parse_args()
    authors = {name.strip() for name in AUTHORS.replace("\n", " ").split(";")}
    found, sample, characters = set(), [], 0
    with lzma.open(arguments.books, "rt") as books, lzma.open(arguments.stories, "wt", preset=6) as stories:
        for line in books:
            book = json.loads(line)
            if book["author"] in authors or book["title"] in TITLES:
                stories.write(line)
                found.add(book["author"])
                characters += len(book["text"])
                # The beginning of every book, so that each has its say in the tokenizer.
                sample.append(book["text"][:200_000])
    missing = sorted(authors - found)
    print(f"{len(sample)} books, {characters:,} characters; authors not found: {', '.join(missing) or 'none'}")
    train_sentencepiece(sample, arguments.tokenizer, arguments.vocab_size)


if __name__ == "__main__":
    main()
