require 'webrick'

server = WEBrick::HTTPServer.new(Port: ENV['PORT'], AccessLog: [], Logger: WEBrick::Log.new(nil, 0))
server.mount_proc('/') do |_, response|
  response.body = "pid=#{Process.pid} generation=#{ENV['REUSE_RUN_GENERATION']}\n"
end
server.start
