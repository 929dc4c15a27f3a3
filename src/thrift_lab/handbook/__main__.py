"""``python -m thrift_lab.handbook`` (``make figures``): write every picture and table of the documentation anew."""

from __future__ import annotations

from thrift_lab.handbook.contents import contents

if __name__ == "__main__":
    for path, text in contents().items():
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print("written" if changed else "as it was", path)
