# Debian's Netty has no native part. PySpark has it among its jars.
if ! ls "$BUILD" | grep -q native-epoll; then
  python3 -m pip download --quiet --no-deps --no-binary :all: --require-hashes --dest "$BUILD" --requirement requirements.txt
  tar -x -f "$BUILD"/pyspark-*.tar.gz -C "$BUILD" --wildcards --strip-components=3 '*/jars/netty-*'
  rm "$BUILD"/pyspark-*.tar.gz
fi
javac -cp "$BUILD/*" -d "$BUILD" Server.java
