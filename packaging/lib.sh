# What the scripts of this folder have in common; sourced from the project's root.
# shellcheck shell=bash
# shellcheck disable=SC2034  # each script uses some of these

name=containerd-shim-pause-v2
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)

# The one time in all files that are made: the date of the latest entry in the package's changelog.
SOURCE_DATE_EPOCH=$(date -d "$(sed -n 's/^ -- .*>  //p' packaging/deb/changelog | head -n 1)" +%s)
export SOURCE_DATE_EPOCH TZ=UTC LC_ALL=C

# Debian's name of a target's architecture.
architecture() {
  case $1 in
    x86_64-*) echo amd64 ;;
    aarch64-*) echo arm64 ;;
    *)
      echo "no package for $1: x86_64-unknown-linux-gnu and aarch64-unknown-linux-gnu have one" >&2
      return 2
      ;;
  esac
}

# What is linked into the shim for a target, as `copyright` or as `sbom`.
linked() { cargo run --quiet --locked --package packaging -- "$1" "$2"; }

# The man page, from its Markdown. go-md2man takes the head of the page from the first line, and writes a font that only
# groff knows and a paragraph after each heading, which mandoc warns of.
manual() {
  local head
  head="# ${name^^} 8 \"$(date -d "@$SOURCE_DATE_EPOCH" +%F)\" \"$name $version\" \"System Administration\""
  sed "1s/.*/$head/" docs/man/$name.8.md | go-md2man | sed -e 's/\\fC//g' -e '/^\.SH/ { n; /^\.PP$/d }'
}

# Copies the files of this checkout below a folder, as far as git has them: packages hold nothing of a work in progress.
# Where git is not there, the files are those of an archive.
copy() {
  local from=$1 to=$2 file
  sources "$from" | while read -r file; do
    install -D -m 644 "$file" "$to/${file#"$from"/}"
  done
}
sources() {
  if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ]; then
    git ls-files "$1"
  else
    find "$1" -type f
  fi | sort
}
