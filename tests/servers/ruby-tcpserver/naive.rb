require 'socket'

body = "pid=#{Process.pid} generation=#{ENV['REUSE_RUN_GENERATION']}\n"
server = TCPServer.new(ENV['PORT'])
loop do
  client = server.accept
  nil until [nil, "\r\n"].include?(client.gets)
  client.write("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: #{body.bytesize}\r\n\r\n#{body}")
  client.close
end
