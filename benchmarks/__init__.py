"""Studies behind the pages of this folder and comparisons with other programs; not part of the wheel."""
